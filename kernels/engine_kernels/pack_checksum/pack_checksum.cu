// Copies pieces of sources into an image and adds their parts to 64-bit checksums (README.md). The interface is plain C. What a thread
// does is compiled for the host as well, so that arithmetic and tables are tested where there is no GPU.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kAbi = 1;
constexpr int kThreads = 256;
constexpr int kWordBytes = 16;

struct Source {
  const uint8_t* from;
  uint8_t* to;  // null: nothing is copied
  uint64_t bytes;
  int64_t first_piece;
};

__host__ __device__ inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDull;
  x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

__host__ __device__ inline uint64_t at(uint64_t position) { return mix(position + 0x9E3779B97F4A7C15ull); }

__host__ __device__ inline uint64_t word_sum(uint64_t lo, uint64_t hi, uint64_t index) {
  const uint64_t key = at(index) | 1;
  return mix(lo ^ key) * key + mix(hi + key);
}

// From global memory that nobody writes to meanwhile, so that reads run ahead of writes. The compiler sees neither in a table of pointers.
template <typename Unit>
__host__ __device__ inline Unit read(const Unit* from) {
#ifdef __CUDA_ARCH__
  return __ldg(from);
#else
  return *from;
#endif
}

// Past the caches: the image is not read again soon.
template <typename Unit>
__host__ __device__ inline void write(Unit* to, Unit value) {
#ifdef __CUDA_ARCH__
  __stcs(to, value);
#else
  *to = value;
#endif
}

// Every `lanes`-th of the words from `lane` on, in the widest units to which source and destination are aligned.
template <typename Unit>
__host__ __device__ inline uint64_t words_sum(const uint8_t* source, uint8_t* destination, uint64_t first, int words, int lane, int lanes) {
  constexpr int kUnits = kWordBytes / sizeof(Unit);
  const Unit* from = reinterpret_cast<const Unit*>(source);
  Unit* to = reinterpret_cast<Unit*>(destination);
  uint64_t total = 0;
#pragma unroll 4
  for (int word = lane; word < words; word += lanes) {
    union {
      Unit units[kUnits];
      uint64_t halves[2];
    } data;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) data.units[i] = read(from + word * kUnits + i);
    if (to != nullptr) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) write(to + word * kUnits + i, data.units[i]);
    }
    total += word_sum(data.halves[0], data.halves[1], first + word);
  }
  return total;
}

// The last bytes, of which there are fewer than a word has.
__host__ __device__ inline uint64_t rest_sum(const uint8_t* from, uint8_t* to, uint64_t index, int bytes) {
  uint64_t lo = 0, hi = 0;
  for (int i = 0; i < bytes; ++i) {
    const uint8_t byte = read(from + i);
    if (to != nullptr) write(to + i, byte);
    if (i < 8) {
      lo |= static_cast<uint64_t>(byte) << (8 * i);
    } else {
      hi |= static_cast<uint64_t>(byte) << (8 * (i - 8));
    }
  }
  return word_sum(lo, hi, index);
}

// What one of `lanes` threads copies of a piece and adds to the checksum of its source.
__host__ __device__ inline uint64_t piece_sum(const Source& source, uint64_t piece, int piece_bytes, int lane, int lanes) {
  const uint64_t begin = piece * piece_bytes, left = source.bytes - begin;
  const int bytes = left < piece_bytes ? static_cast<int>(left) : piece_bytes, words = bytes / kWordBytes, rest = bytes % kWordBytes;
  const uint8_t* from = source.from + begin;
  uint8_t* to = source.to == nullptr ? nullptr : source.to + begin;
  const uint64_t first = begin / kWordBytes, both = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  uint64_t total = lane == 0 && piece == 0 ? at(source.bytes) : 0;
  if (both % 16 == 0) {
    total += words_sum<uint4>(from, to, first, words, lane, lanes);
  } else if (both % 4 == 0) {
    total += words_sum<uint32_t>(from, to, first, words, lane, lanes);
  } else if (both % 2 == 0) {
    total += words_sum<uint16_t>(from, to, first, words, lane, lanes);
  } else {
    total += words_sum<uint8_t>(from, to, first, words, lane, lanes);
  }
  if (lane == 0 && rest != 0) {
    const int done = words * kWordBytes;
    total += rest_sum(from + done, to == nullptr ? nullptr : to + done, first + words, rest);
  }
  return total;
}

__global__ void __launch_bounds__(kThreads) pack_checksum(const Source* sources, const int32_t* owners, int piece_bytes, unsigned long long* sums) {
  __shared__ uint64_t of_warps[kThreads / 32];
  const int owner = owners[blockIdx.x];
  const Source source = sources[owner];
  uint64_t total = piece_sum(source, blockIdx.x - source.first_piece, piece_bytes, threadIdx.x, kThreads);
  for (int distance = 16; distance != 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) total += of_warps[warp];
    atomicAdd(sums + owner, total);  // integers: any order gives the same sum
  }
}

}  // namespace

extern "C" {

int lockstep_abi() { return kAbi; }

// Tables as tables.py makes them, on the device as `sums` is, which begins as zeros. Returns a cudaError_t: 0 is success.
int lockstep_pack_checksum(const void* sources, const int32_t* owners, int pieces, int piece_bytes, uint64_t* sums, void* stream) {
  pack_checksum<<<pieces, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Source*>(sources), owners, piece_bytes, reinterpret_cast<unsigned long long*>(sums));
  return cudaGetLastError();
}

// The same in the memory of the host.
void lockstep_pack_checksum_host(const void* sources, const int32_t* owners, int pieces, int piece_bytes, uint64_t* sums) {
  for (int piece = 0; piece < pieces; ++piece) {
    const Source& source = static_cast<const Source*>(sources)[owners[piece]];
    sums[owners[piece]] += piece_sum(source, piece - source.first_piece, piece_bytes, 0, 1);
  }
}

}  // extern "C"
