"""Against a checksum of README.md's formulas in numpy, on bytes: plain torch, Triton's interpreter, and the CUDA source built for the host."""

import logging
import os
import re
import shutil
import subprocess
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_kernels.pack_checksum import checksums, cuda, naive, pack_checksum, tables
from tests.kernels.sm90 import Case, compile_all

U64 = np.uint64
DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64, torch.complex128]
NVCC = "nvcc -std=c++17 -O3 -gencode arch=compute_90,code=sm_90 --shared -Xcompiler -fPIC"


def mix(x):
    x = (x ^ (x >> U64(33))) * U64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> U64(33))) * U64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> U64(33))


def expected(data):
    """The checksum of an array of bytes, as a signed integer."""
    words = np.zeros(-(-data.size // 16) * 16, np.uint8)
    words[: data.size] = data
    lo, hi = words.view("<u8").reshape(-1, 2).T
    at = mix(np.arange(max(lo.size, 1), dtype=U64) + U64(0x9E3779B97F4A7C15))
    key = at[: lo.size] | U64(1)
    length = mix(np.array([data.size], U64) + U64(0x9E3779B97F4A7C15))
    return (length + (mix(lo ^ key) * key + mix(hi + key)).sum(dtype=U64)).view(np.int64).item()


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy()


def sample(sizes_alignments, dtypes, gaps, seed=0):
    """Sources of random bytes that lie ``alignment`` bytes after a multiple of 16 (as far as their dtypes can), and offsets for them."""
    generator, sources, offsets, end = torch.Generator().manual_seed(seed), [], [], 0
    for i, (size, alignment) in enumerate(sizes_alignments):
        dtype = dtypes[i % len(dtypes)]
        size, alignment = size // dtype.itemsize * dtype.itemsize, alignment // dtype.itemsize * dtype.itemsize
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (size + 32,), generator=generator, dtype=torch.uint8)
        begin = -data.data_ptr() % 16 + alignment
        sources.append(data[begin : begin + size].view(dtype))
        offsets.append(end + gaps[i % len(gaps)])
        end = offsets[-1] + size
    return sources, offsets, torch.full((end + 3,), 0xA5, dtype=torch.uint8)


def check(run, sources, offsets, image):
    goal = image.numpy().copy()
    for source, offset in zip(sources, offsets, strict=True):
        goal[offset : offset + source.nbytes] = raw(source)
    found = run(sources, offsets, image)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected(raw(source)) for source in sources]
    assert np.array_equal(image.numpy(), goal)
    assert torch.equal(run(sources, (), None), found)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The path of the library, and what ptxas says of its kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA source cannot be built")
    path = tmp_path_factory.mktemp("pack_checksum") / "libpack_checksum.so"
    source = Path(cuda.__file__).with_name("pack_checksum.cu")
    done = subprocess.run([*NVCC.split(), "-Xptxas", "-v", str(source), "-o", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path, done.stderr


@pytest.fixture(params=["naive", "triton", "cuda"])
def run(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        return import_module("engine_kernels.pack_checksum.triton").pack_checksum
    if request.param == "cuda":
        return partial(cuda.pack_checksum, cuda.load(request.getfixturevalue("built")[0]))
    return naive.pack_checksum


@pytest.mark.parametrize("gaps", [(0,), (0, 1, 6, 4)], ids=["one after another", "with gaps"])
def test_all_sizes_alignments_and_dtypes(run, gaps):
    sizes = [*range(36), 100, 4096, 32752, 32768, 32769, 2 * 32768 + 5, 40_000]
    cases = [(size, alignment) for size, alignment in zip(sizes, [0, 0, 8, 4, 2, 1, 0, 3] * 6)]
    check(run, *sample(cases, [torch.uint8], gaps))
    check(run, *sample([(size + 16, 16 * i) for i, size in enumerate(sizes[::9])], DTYPES, gaps, seed=1))


@pytest.mark.parametrize("alignment", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_source_and_image_aligned_differently(run, alignment, offset):
    check(run, *sample([(33_000, alignment)], [torch.uint8], [offset]))


def test_triton_is_told_of_alignment_where_it_holds(monkeypatch):
    """A GPU would fail where it does not; this machine's processor need not."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    told = []
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", lambda self, _, by: told.append((self.data.item(), by)))
    sources, _, _ = sample([(100, alignment) for alignment in (0, 0, 1, 8, 8, 4)], [torch.uint8], [0])
    offsets = [0, 136, 256, 384, 520, 644]  # only the first is aligned as its source is
    check(import_module("engine_kernels.pack_checksum.triton").pack_checksum, sources, offsets, torch.zeros(800, dtype=torch.uint8))
    assert len(told) > 1
    assert all(by == [16] and address % 16 == 0 for address, by in told)


def test_many_small_sources(run, request):
    count = 200 if "triton" in request.node.name else 3000  # the interpreter takes 5 ms for each
    sizes = np.random.default_rng(0).integers(0, 70, count)
    check(run, *sample([(int(size), int(size) % 5) for size in sizes], DTYPES, (0, 1, 2, 9)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 15)), min_size=1, max_size=5), st.lists(st.integers(0, 40), min_size=1), st.data())
def test_plain_torch_on_anything(cases, gaps, data):
    sources, offsets, image = sample(cases, data.draw(st.permutations(DTYPES)), gaps)
    check(lambda s, o, i: checksums(s) if i is None else pack_checksum(s, o, i), sources, offsets, image)


def test_it_does_not_depend_on_pieces(monkeypatch, built):
    (source,), offsets, image = sample([(1000, 0)], [torch.uint8], [0])
    library = cuda.load(built[0])
    for size in (16, 48, 1024):
        monkeypatch.setattr(naive, "PIECE_BYTES", size)
        monkeypatch.setattr(tables, "PIECE_BYTES", size)
        monkeypatch.setattr(cuda, "PIECE_BYTES", size)
        check(naive.pack_checksum, [source], offsets, image)
        check(partial(cuda.pack_checksum, library), [source], offsets, image)


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0x9CA066F1A4AB2EEA),
        (b"\0", 0xC5B08EA50D521045),
        (b"lockstep", 0x8E387CC42524CC26),
        (bytes(range(256)) * 5 + b"end", 0xE4D7A309FA8A50E3),
    ],
)
def test_checksums_that_may_have_been_stored_stay(data, checksum):
    (found,) = checksums([torch.tensor(list(data), dtype=torch.uint8)]).tolist()
    assert found % 2**64 == checksum


CHANGES = {
    "a flipped bit": lambda d, r: np.bitwise_xor.at(d, r.integers(d.size), 1 << r.integers(8)),
    "a byte of the last word": lambda d, r: np.add.at(d, -1 - r.integers(16), 1 + r.integers(255)),
    "two flipped bits": lambda d, r: np.bitwise_xor.at(d, r.choice(d.size, 2, replace=False), 1 << r.integers(8)),
    "words that changed places": lambda d, r: swap(d.reshape(-1, 16), r),
    "halves that changed places": lambda d, r: swap(d.reshape(-1, 8), r),
    "zeros": lambda d, r: d[(begin := r.integers(d.size)) : begin + 1 + r.integers(64)].fill(0),
}


def swap(rows, random):
    i, j = random.choice(len(rows), 2, replace=False)
    rows[[i, j]] = rows[[j, i]]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["random", "floats", "ramp"])
def test_damage_shows(change, kind):
    random = np.random.default_rng(0)
    data = {
        "random": random.integers(0, 256, 640, dtype=np.uint8),
        "floats": random.standard_normal(160).astype(np.float32).view(np.uint8),
        "ramp": np.arange(160, dtype=np.uint32).view(np.uint8),
    }[kind]
    damaged = [data.copy() for _ in range(300)]
    for each in damaged:
        change(each, random)
    damaged = [each for each in damaged if not np.array_equal(each, data)]
    assert len(damaged) > 100
    assert expected(data) not in checksums([torch.from_numpy(each) for each in damaged]).tolist()


def test_zeros_of_any_length_differ():
    found = checksums([torch.zeros(size, dtype=torch.uint8) for size in range(1500)])
    assert len(set(found.tolist())) == 1500


def test_torchs_own_checks_of_an_operator():
    sources, offsets, image = sample([(40, 0), (0, 0), (100, 4)], [torch.float32, torch.int64, torch.bfloat16], (3,))
    torch.library.opcheck(torch.ops.lockstep.pack_checksum.default, (sources, offsets, image))
    torch.library.opcheck(torch.ops.lockstep.checksums.default, (sources,))


def test_it_compiles_into_one_graph():
    sources, offsets, image = sample([(40, 0), (0, 0), (100, 4)], [torch.float32], (4,))
    once, compiled = image.clone(), torch.compile(pack_checksum, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(sources, offsets, image), pack_checksum(sources, offsets, once))
    assert torch.equal(image, once)


def test_lazy_conjugates_and_negatives_are_copied_by_their_values():
    lazy, image = [torch.randn(3, dtype=torch.complex128).conj(), torch._neg_view(torch.randn(4))], torch.zeros(64, dtype=torch.uint8)
    found = pack_checksum(lazy, [0, 48], image)
    assert torch.equal(image[:48].view(torch.complex128), lazy[0])
    assert torch.equal(image[48:].view(torch.float32), lazy[1])
    assert found.tolist() == [expected(image[:48].numpy()), expected(image[48:].numpy())]


def test_parameters_scalars_and_no_source_at_all():
    parameter, scalar, image = torch.nn.Parameter(torch.randn(3, 5)), torch.tensor(7.5), torch.zeros(64, dtype=torch.uint8)
    found = pack_checksum([parameter, scalar], [0, 60], image)
    assert found.tolist() == [expected(raw(parameter.detach())), expected(raw(scalar))]
    assert torch.equal(image.view(torch.float32)[[*range(15), 15]], torch.cat([parameter.detach().flatten(), scalar[None]]))
    for none in (pack_checksum([], [], image), checksums([])):
        assert none.shape == (0,)
        assert none.dtype == torch.int64


BYTES = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("sources", "offsets", "image", "message"),
    [
        ([BYTES, BYTES], [0, 7], torch.zeros(99, dtype=torch.uint8), "source 1 goes to byte 7 on, but source 0 ends at byte 8"),
        ([BYTES, BYTES[:0], BYTES[:1]], [3, 5, 6], torch.zeros(99, dtype=torch.uint8), "source 2 goes to byte 6 on, but source 0 ends at byte 11"),
        ([BYTES], [92], torch.zeros(99, dtype=torch.uint8), "source 0 goes to bytes 92 to 100; the image has 99"),
        ([BYTES], [-1], torch.zeros(99, dtype=torch.uint8), "source 0 goes to bytes -1 to 7; the image has 99"),
        ([BYTES], [], torch.zeros(99, dtype=torch.uint8), "there are 1 sources and 0 offsets"),
        ([BYTES.to("meta")], [0], torch.zeros(99, dtype=torch.uint8), "source 0 is on meta; it must be on cpu"),
        ([BYTES, BYTES[::2]], [0, 8], torch.zeros(99, dtype=torch.uint8), r"source 1 is \(4,\) with strides \(2,\); it must be contiguous"),
        ([BYTES], [0], torch.zeros(99), r"the image is torch.float32 \(99,\) with strides \(1,\); it must be contiguous uint8"),
        ([BYTES], [0], torch.zeros(9, 9, dtype=torch.uint8), r"it must be contiguous uint8 \[bytes\]"),
        ([BYTES], [0], torch.zeros(99, dtype=torch.uint8)[::2], r"with strides \(2,\); it must be contiguous uint8"),
        ([BYTES[:4]], [0], BYTES[3:], "source 0 shares memory with the image"),
    ],
)
def test_what_does_not_fit(sources, offsets, image, message):
    with pytest.raises(ValueError, match=message):
        pack_checksum(sources, offsets, image)


def test_an_empty_source_may_lie_within_anothers_destination():
    assert pack_checksum([BYTES, BYTES[:0]], [0, 4], torch.zeros(8, dtype=torch.uint8)).shape == (2,)


@pytest.mark.parametrize("state", ["built", "not built", "for other GPUs"])
def test_the_library_is_used_where_it_can_be_and_that_is_said_once(state, built, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "engine_kernels")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if state == "for other GPUs" else (9, 0))
    monkeypatch.setattr(cuda, "PATH", built[0].with_name("none.so") if state == "not built" else built[0])
    cuda.library.cache_clear()
    found = [cuda.library(torch.device("cuda", 0)) for _ in range(3)]
    cuda.library.cache_clear()
    assert all((library is not None) == (state == "built") for library in found)
    (record,) = caplog.records
    reason = {"built": f"cuda:0: {cuda.PATH}", "not built": "Triton, since .*none.so", "for other GPUs": "Triton, since .* compute capability 9.x"}
    assert re.search(reason[state], record.getMessage())


def test_a_library_of_another_version_is_refused(built, monkeypatch):
    monkeypatch.setattr(cuda, "ABI", 7)
    with pytest.raises(OSError, match="is of version 1, not 7: run `make kernels` again"):
        cuda.load(built[0])


def test_nvcc_makes_128_bit_copies_and_spills_nothing(built):
    path, said = built
    assert re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", said) == [
        ("0", k) for k in ("stack frame", "spill stores", "spill loads")
    ]
    triton = pytest.importorskip("triton")
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    code = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= 4  # read ahead by the unrolled loop
    assert len(re.findall(r"\bSTG\.E[.A-Z]*\.128\b", code)) >= 4
    assert len(re.findall(r"\bRED\w*\.E\.ADD\.64\b", code)) == 1
    assert not re.search(r"\b(LD|ST)\.E\b", code)  # all memory is known to be global


def test_an_h100_copies_128_bits_at_once_with_triton():
    pytest.importorskip("triton")
    types = {"rows": "*i64", "owners": "*i32", "sums": "*i64"}
    constants = {"PIECE": tables.PIECE_BYTES, "WORDS": 1024, "SINGLE_WORDS": 128}
    (made,) = compile_all([Case("engine_kernels.pack_checksum.triton", "_pack_checksum", types, constants, num_warps=8)])
    assert made.spilled_bytes == made.stack_bytes == made.register_wgmma == 0
    assert made.vector_loads == made.vector_stores == 4
    assert made.atomics == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(built):
    sources, offsets, image = sample([(100_000, 0), (99_999, 1), (0, 0), (70, 4), (80, 2)], [torch.uint8], (0, 1))
    moved, copy = [source.cuda() for source in sources], image.cuda()
    found = cuda.pack_checksum(cuda.load(built[0]), moved, offsets, copy)
    assert torch.equal(found.cpu(), naive.pack_checksum(sources, offsets, image))
    assert torch.equal(copy.cpu(), image)
