"""Read: sorted range reads, every block verified before its elements reach their targets."""

from collections.abc import Sequence

import torch
from msgspec import Struct

from engine.errors import CheckpointCorrupt
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, digest
from engine.format.dtypes import ITEM_BYTES
from engine.format.manifest import Chunk, FileEntry
from engine.plan.reads import RUN_BYTES, Need, Slice, runs, slices
from engine.state.boxes import Box, flat_span, flat_to_boxes, intersect
from engine.state.shard import bytes_of, torch_dtype
from engine.storage import Reader
from engine.transfer.stored import REMEDY, StoredCheckpoint

DIRECT_BYTES = 1024 * 1024
"""Slices from this size on are read straight into their target, where they can be."""


class Request(Struct, frozen=True, gc=False):
    """Fill ``target`` (of ``inner``'s sizes, any dtype and strides) from ``inner``, a box within the chunk that ``rank`` wrote of
    ``tensor`` at ``offsets``."""

    tensor: str
    rank: int
    offsets: tuple[int, ...]
    inner: Box
    target: torch.Tensor


def fill(stored: StoredCheckpoint, requests: Sequence[Request]) -> int:
    """Carry out the requests; returns the bytes read. Raises :class:`CheckpointCorrupt` naming file, tensor and writing rank."""
    by_file: dict[tuple[int, int], list[Need]] = {}
    for i, request in enumerate(requests):
        number, chunk = stored.chunk(request.tensor, request.offsets, request.rank)
        if request.inner.sizes != chunk.sizes and not _fits(request.inner, chunk.sizes):
            raise CheckpointCorrupt(
                f"{stored.where}, written by rank {request.rank}: {request.tensor} at {list(chunk.offsets)} has sizes {list(chunk.sizes)}, "
                f"but elements up to {[o + n for o, n in zip(request.inner.offsets, request.inner.sizes, strict=True)]} of it are needed. {REMEDY}"
            )
        if chunk.nbytes:
            dtype = stored.tensors[request.tensor].dtype
            need = Need(i, number, chunk.sizes, request.inner, dtype, chunk.offset, chunk.nbytes)
            by_file.setdefault((request.rank, chunk.file), []).append(need)
    buffer = torch.empty(RUN_BYTES, dtype=torch.uint8) if by_file else torch.empty(0, dtype=torch.uint8)
    return sum(_FileReader(stored, rank, number, requests, buffer).fill(needs) for (rank, number), needs in sorted(by_file.items()))


def _fits(inner: Box, sizes: tuple[int, ...]) -> bool:
    return all(o + n <= size for o, n, size in zip(inner.offsets, inner.sizes, sizes, strict=True))


class _FileReader:
    def __init__(self, stored: StoredCheckpoint, rank: int, number: int, requests: Sequence[Request], buffer: torch.Tensor) -> None:
        self._stored = stored
        self._rank = rank
        self._index = stored.index(rank)
        self._file: FileEntry = self._index.files[number]
        self._requests = requests
        self._buffer = buffer
        self._bytes = bytes_of(buffer)

    def fill(self, needs: list[Need]) -> int:
        total, gathered = 0, []
        reader = self._open()
        try:
            self._check_header(reader)
            for piece in slices(needs):
                target = self._target_memory(piece)
                if target is None:
                    gathered.append(piece)
                    continue
                reader.read_into(piece.offset, target)
                total += piece.nbytes
                self._verify(self._index.chunk(piece.chunk), piece, target)
            for run in runs(gathered):
                begin = run[0].offset
                size_bytes = run[-1].offset + run[-1].nbytes - begin
                reader.read_into(begin, self._bytes[:size_bytes])
                total += size_bytes
                self._take(run)
        finally:
            reader.close()
        return total

    def _target_memory(self, piece: Slice) -> memoryview | None:
        """Where a large slice can be read straight to: one contiguous CPU target takes it whole, rows and dtype alike. It is
        verified there: a load that fails says that live state is partly overwritten anyway."""
        if piece.nbytes < DIRECT_BYTES or len(piece.needs) != 1:
            return None
        need = piece.needs[0]
        target = self._requests[need.item].target
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

    def _check_header(self, reader: Reader) -> None:
        header = memoryview(bytearray(self._file.header_bytes))
        reader.read_into(0, header)
        if digest(header) != self._file.header_digest:
            raise CheckpointCorrupt(f"{self._stored.where}/{self._file.name}, written by rank {self._rank}: its header has changed. {REMEDY}")

    def _take(self, run: list[Slice]) -> None:
        """Verify a run, then copy: chunks that are wanted whole in one batch, pieces of chunks one by one."""
        begin = run[0].offset
        whole: dict[str, list[tuple[int, Chunk, torch.Tensor]]] = {}
        for piece in run:
            chunk = self._index.chunk(piece.chunk)
            low = piece.offset - begin
            self._verify(chunk, piece, self._bytes[low : low + piece.nbytes])
            for need in piece.needs:
                target = self._requests[need.item].target
                if piece.nbytes == chunk.nbytes and need.inner.sizes == chunk.sizes:
                    whole.setdefault(need.dtype, []).append((low, chunk, target))
                else:
                    flat = self._elements(low, piece.nbytes, need.dtype)
                    _copy_piece(flat, chunk.sizes, piece.first_block * BLOCK_BYTES // flat.element_size(), need.inner, target)
        for dtype, chunks in whole.items():
            torch._foreach_copy_([target for *_, target in chunks], self._views(dtype, chunks))

    def _views(self, dtype: str, chunks: list[tuple[int, Chunk, torch.Tensor]]) -> list[torch.Tensor]:
        """The chunks' elements in the buffer: one split where they lie without gaps, which they nearly always do."""
        first, last = chunks[0][0], chunks[-1][0] + chunks[-1][1].nbytes
        if last - first == sum(chunk.nbytes for _, chunk, _ in chunks) and len({low for low, *_ in chunks}) == len(chunks):
            width = ITEM_BYTES[dtype]
            flats = self._elements(first, last - first, dtype).split([chunk.nbytes // width for _, chunk, _ in chunks])
        else:
            flats = [self._elements(low, chunk.nbytes, dtype) for low, chunk, _ in chunks]
        return [flat if len(chunk.sizes) == 1 else flat.view(chunk.sizes) for flat, (_, chunk, _) in zip(flats, chunks, strict=True)]

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


def _copy_piece(flat: torch.Tensor, sizes: tuple[int, ...], start: int, inner: Box, target: torch.Tensor) -> None:
    """``flat`` holds the elements from ``start`` on of a chunk of ``sizes``; copy those inside ``inner`` to ``target``."""
    position = 0
    for box in flat_to_boxes(sizes, start, start + flat.numel()):
        overlap = intersect(box, inner)
        if overlap is not None:
            source, goal = flat[position : position + box.numel].view(box.sizes), target
            for dim in range(len(sizes)):
                source = source.narrow(dim, overlap.offsets[dim] - box.offsets[dim], overlap.sizes[dim])
                goal = goal.narrow(dim, overlap.offsets[dim] - inner.offsets[dim], overlap.sizes[dim])
            goal.copy_(source)
        position += box.numel
