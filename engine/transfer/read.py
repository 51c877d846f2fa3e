"""Read: sorted range reads, every block verified before its elements reach their targets."""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from msgspec import Struct

from engine.errors import CheckpointCorrupt
from engine.events import Ticker
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, digest
from engine.format.dtypes import ITEM_BYTES
from engine.format.manifest import Chunk, FileEntry
from engine.plan.exchange import Homes, homes_of, overlaps
from engine.plan.reads import RUN_BYTES, Need, Slice, block_span, runs, slices
from engine.state.boxes import Box, flat_span
from engine.state.shard import bytes_of, torch_dtype
from engine.storage import Reader
from engine.transfer.stored import REMEDY, StoredCheckpoint

DIRECT_BYTES = 1024 * 1024
"""Slices from this size on are read straight into their target, where they can be."""
_THREADS = 2
"""Of a rank, for these: one reads while another hashes."""

File = tuple[int, int]
"""A shard file: the rank that wrote it, and which of its files."""


class Request(Struct, frozen=True, gc=False):
    """Fill ``target`` (of ``inner``'s sizes, any dtype and strides) from ``inner``, a box within the chunk that ``rank`` wrote of
    ``tensor`` at ``offsets``."""

    tensor: str
    rank: int
    offsets: tuple[int, ...]
    inner: Box
    target: torch.Tensor


class Reads:
    """What ``rank`` of ``world_size`` that load needs of a step, by file. Made without reading a shard file.

    Raises :class:`CheckpointCorrupt` where the indexes have not what the manifest says.
    """

    def __init__(self, stored: StoredCheckpoint, requests: Sequence[Request], rank: int = 0, world_size: int = 1) -> None:
        self.stored = stored
        self.targets = [request.target for request in requests]
        self.rank, self.world_size = rank, world_size
        self.ticker = Ticker(f"reading {stored.where}")
        self.homes = Homes(stored.manifest.summary.world_size, world_size)
        self.by_file: dict[File, list[Need]] = {}
        for i, request in enumerate(requests):
            number, chunk = stored.chunk(request.tensor, request.offsets, request.rank)
            inner = request.inner
            if inner.sizes != chunk.sizes and not _fits(inner, chunk.sizes):
                needed = [o + n for o, n in zip(inner.offsets, inner.sizes, strict=True)]
                raise CheckpointCorrupt(
                    f"{stored.where}, written by rank {request.rank}: {request.tensor} at {list(chunk.offsets)} has sizes {list(chunk.sizes)}, "
                    f"but elements up to {needed} of it are needed. {REMEDY}"
                )
            if chunk.nbytes:
                need = Need(i, number, chunk.sizes, inner, stored.tensors[request.tensor].dtype, chunk.offset, chunk.nbytes)
                file = (request.rank, chunk.file)
                if file in self.by_file:
                    self.by_file[file].append(need)
                else:
                    self.by_file[file] = [need]

    @property
    def is_shared(self) -> bool:
        """Whether another rank is the home of anything that is needed here."""
        own = range(self.rank, self.rank + 1)
        others = {file: needs for file, needs in self.by_file.items() if self.homes.of_writer(file[0]) != own}
        return any(homes_of(need, self.shares(file, need)) != [self.rank] for file, needs in others.items() for need in needs)

    def asked(self) -> dict[int, dict[File, list[Need]]]:
        """By home what is needed of it, in the order in which it sends: by file, chunk and first block."""
        found: dict[int, dict[File, list[Need]]] = {}
        for file, needs in sorted(self.by_file.items()):
            for need in sorted(needs, key=lambda need: (need.begin, block_span(need)[0])):
                for home in homes_of(need, self.shares(file, need)):
                    found.setdefault(home, {}).setdefault(file, []).append(need)
        return found

    def shares(self, file: File, need: Need) -> list[tuple[int, int]]:
        """Of the chunk of a need, see :meth:`engine.plan.exchange.Homes.shares`."""
        position = need.begin - self.stored.index(file[0]).files[file[1]].header_bytes
        return self.homes.shares(file[0], position, need.nbytes)


class Asked(Need, frozen=True, gc=False):
    """A need of another rank."""

    requester: int


def fill(reads: Reads) -> int:
    """Read here all that is needed here; returns the bytes read. Raises :class:`CheckpointCorrupt` naming file, tensor and writing
    rank."""
    buffer = read_buffer() if reads.by_file else torch.empty(0, dtype=torch.uint8, device="cpu")
    return sum(FileReader(reads, file, buffer).fill(needs) for file, needs in sorted(reads.by_file.items()))


def read_buffer() -> torch.Tensor:
    return torch.empty(RUN_BYTES, dtype=torch.uint8, device="cpu")


def _fits(inner: Box, sizes: tuple[int, ...]) -> bool:
    return all(o + n <= size for o, n, size in zip(inner.offsets, inner.sizes, sizes, strict=True))


Direct = list[tuple[Slice, memoryview]]
"""Slices that are read straight into these parts of their targets."""


class FileReader:
    """One shard file. Opened as a context. ``buffer`` holds the last run that was read."""

    def __init__(self, reads: Reads, file: File, buffer: torch.Tensor) -> None:
        self._stored = reads.stored
        self._targets = reads.targets
        self._rank, self._number = file
        self._checks_header = reads.homes.of_writer(self._rank)[0] == reads.rank
        self._index = reads.stored.index(self._rank)
        self._file: FileEntry = self._index.files[self._number]
        self._buffer = buffer
        self._bytes = bytes_of(buffer)
        self.bytes_read = 0
        self._ticker = reads.ticker

    def __enter__(self) -> "FileReader":
        self._reader = self._open()
        try:
            self._check_header()
        except BaseException:
            self._reader.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    def fill(self, needs: list[Need]) -> int:
        with self:
            direct, gathered = self.split(slices(needs))
            for run in runs(gathered):
                self.read(run)
                self.take(run)
            self.read_direct(direct)
        return self.bytes_read

    def split(self, pieces: Iterable[Slice]) -> tuple[Direct, list[Slice]]:
        """Which are read straight into their targets, and which through the buffer."""
        direct, gathered = [], []
        for piece in pieces:
            target = self._target_memory(piece) if piece.nbytes >= DIRECT_BYTES else None
            if target is None:
                gathered.append(piece)
            else:
                direct.append((piece, target))
        return direct, gathered

    def read_direct(self, direct: Direct) -> None:
        """Verified where they lie: a load that fails says that live state is partly overwritten anyway."""

        left = deque(direct)

        def read_some(_: int) -> None:
            while left:
                try:
                    piece, target = left.popleft()
                except IndexError:  # another thread has taken it
                    return
                self._reader.read_into(piece.offset, target)
                self._verify(self._index.chunk(piece.chunk), piece, target)
                self._ticker.add(piece.nbytes)

        if len(direct) < 2:
            read_some(0)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(read_some, range(_THREADS)))
        self.bytes_read += sum(piece.nbytes for piece, _ in direct)

    def read(self, run: list[Slice]) -> None:
        """Into the buffer, and verify."""
        begin = run[0].offset
        size_bytes = run[-1].offset + run[-1].nbytes - begin
        self._reader.read_into(begin, self._bytes[:size_bytes])
        self.bytes_read += size_bytes
        self._ticker.add(size_bytes)
        chunk_of, data = self._index.chunk, self._bytes
        for piece in run:
            low, chunk = piece.offset - begin, chunk_of(piece.chunk)
            is_sound = len(chunk.digests) == DIGEST_BYTES and digest(data[low : low + piece.nbytes]) == chunk.digests
            if not is_sound:
                self._verify(chunk, piece, data[low : low + piece.nbytes])

    def _target_memory(self, piece: Slice) -> memoryview | None:
        """Where a large slice can be read straight to: one contiguous CPU target takes it whole, rows and dtype alike."""
        if len(piece.needs) != 1 or isinstance(piece.needs[0], Asked):
            return None
        need = piece.needs[0]
        target = self._targets[need.item]
        alike = target.dtype == torch_dtype(need.dtype) and need.inner.sizes[1:] == need.sizes[1:]
        if not (alike and target.device.type == "cpu" and target.is_contiguous()):
            return None
        low = piece.first_block * BLOCK_BYTES - flat_span(need.sizes, need.inner)[0] * target.element_size()
        if low < 0 or low + piece.nbytes > target.numel() * target.element_size():
            return None  # blocks at its ends hold neighbours' elements too
        return bytes_of(target.detach().view(-1).view(torch.uint8))[low : low + piece.nbytes]

    def _open(self) -> Reader:
        path = f"{self._stored.where}/{self._file.name}"
        try:
            reader = self._stored.storage.open(self._stored.path(self._file.name))
        except FileNotFoundError:
            raise CheckpointCorrupt(f"{path}, written by rank {self._rank}, is missing. {REMEDY}") from None
        if reader.size_bytes != self._file.size_bytes:
            reader.close()
            raise CheckpointCorrupt(
                f"{path}, written by rank {self._rank}, has {reader.size_bytes} bytes, {self._file.size_bytes} expected. {REMEDY}"
            )
        return reader

    def _check_header(self) -> None:
        """By one rank, and once a load: the home of what comes first in the file."""
        if not self._checks_header or (self._rank, self._number) in self._stored.sound_headers:
            return
        header = memoryview(bytearray(self._file.header_bytes))
        self._reader.read_into(0, header)
        self.bytes_read += len(header)
        if digest(header) != self._file.header_digest:
            raise CheckpointCorrupt(f"{self._stored.where}/{self._file.name}, written by rank {self._rank}: its header has changed. {REMEDY}")
        self._stored.sound_headers.add((self._rank, self._number))

    def take(self, run: list[Slice]) -> None:
        """Copy from the run that was read last: chunks that are wanted whole in one batch, pieces of chunks one by one."""
        begin = run[0].offset
        whole: dict[str, list[tuple[int, Need]]] = {}
        for piece in run:
            low = piece.offset - begin
            for need in piece.needs:
                if piece.nbytes == need.nbytes and need.inner.sizes == need.sizes:
                    if type(need) is Need:
                        if need.dtype not in whole:
                            whole[need.dtype] = []
                        whole[need.dtype].append((low, need))
                elif type(need) is Need:
                    flat, target = self._elements(low, piece.nbytes, need.dtype), self._targets[need.item]
                    for position, box, overlap in overlaps(piece, need):
                        part(target, need.inner, overlap).copy_(part(flat[position : position + box.numel].view(box.sizes), box, overlap))
        targets = self._targets
        for dtype, chunks in whole.items():
            torch._foreach_copy_([targets[need.item] for _, need in chunks], self._views(dtype, chunks))

    def packed(self, run: list[Slice], piece: Slice, need: Need) -> torch.Tensor:
        """The bytes of the elements of ``need`` in a piece of the run that was read last, in the chunk's order: a copy."""
        low, width = piece.offset - run[0].offset, ITEM_BYTES[need.dtype]
        flat, parts = self._buffer[low : low + piece.nbytes].view(-1, width), []
        for position, box, overlap in overlaps(piece, need):
            found = part(flat[position : position + box.numel].view(*box.sizes, width), box, overlap)
            parts.append(found.reshape(-1))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device="cpu")

    def _views(self, dtype: str, chunks: list[tuple[int, Need]]) -> list[torch.Tensor]:
        """The chunks' elements in the buffer: one split where they lie without gaps, which they nearly always do."""
        sizes = [need.nbytes for _, need in chunks]
        if all(low + size == after for (low, _), size, (after, _) in zip(chunks, sizes, chunks[1:], strict=False)):
            width, first = ITEM_BYTES[dtype], chunks[0][0]
            flats = self._elements(first, sum(sizes), dtype).split([size // width for size in sizes])
        else:
            flats = [self._elements(low, need.nbytes, dtype) for low, need in chunks]
        return [flat if len(need.sizes) == 1 else flat.view(need.sizes) for flat, (_, need) in zip(flats, chunks, strict=True)]

    def _elements(self, low: int, nbytes: int, dtype: str) -> torch.Tensor:
        data = self._buffer[low : low + nbytes]
        if low % ITEM_BYTES[dtype]:
            data = data.clone()  # never for files in our order, larger items first
        return data.view(torch_dtype(dtype))

    def _verify(self, chunk: Chunk, piece: Slice, data: memoryview) -> None:
        for block in range(piece.first_block, piece.stop_block):
            at = (block - piece.first_block) * BLOCK_BYTES
            if digest(data[at : at + BLOCK_BYTES]) != chunk.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
                tensor = self._stored.manifest.tensors[chunk.tensor]
                first = chunk.offset + block * BLOCK_BYTES
                raise CheckpointCorrupt(
                    f"{self._stored.where}/{self._file.name}, written by rank {self._rank}: {tensor.name} at {list(chunk.offsets)} has changed: "
                    f"the checksum of bytes {first} to {min(first + BLOCK_BYTES, chunk.offset + chunk.nbytes)} does not match. {REMEDY}"
                )


def unpack(data: torch.Tensor, piece: Slice, need: Need, target: torch.Tensor) -> torch.Tensor:
    """The reverse of :meth:`FileReader.packed`: copies to ``target`` what comes first in ``data``; returns what follows."""
    for _, _, overlap in overlaps(piece, need):
        size_bytes = overlap.numel * ITEM_BYTES[need.dtype]
        source = data[:size_bytes]
        if source.storage_offset() % ITEM_BYTES[need.dtype]:
            source = source.clone()
        part(target, need.inner, overlap).copy_(source.view(torch_dtype(need.dtype)).view(overlap.sizes))
        data = data[size_bytes:]
    return data


def part(view: torch.Tensor, box: Box, inner: Box) -> torch.Tensor:
    """The view of ``inner`` in the view of ``box`` around it."""
    if inner.sizes == box.sizes:
        return view
    for dim, (offset, base, size) in enumerate(zip(inner.offsets, box.offsets, inner.sizes, strict=True)):
        view = view.narrow(dim, offset - base, size)
    return view
