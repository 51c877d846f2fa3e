"""What a load reads: the block runs of stored chunks, sorted by file and offset, neighbours joined."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

from msgspec import Struct

from engine.format.checksum import BLOCK_BYTES
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent, LogicalTensor, Part
from engine.state.boxes import Box, flat_span, intersect, part_box, shift, writers

RUN_BYTES = 4 * 1024 * 1024
"""The longest run that is read at once: as much as stays in a processor's cache until it is verified."""


def wants(tensor: LogicalTensor, target: Box) -> Iterator[tuple[int, Box, Box]]:
    """The parts of ``target`` as (rank that wrote it, the stored box it lies in, the overlap). Absent elements are in none."""
    for part in tensor.parts:
        yield from writers(tensor, part, target)


@lru_cache(maxsize=64)  # ten thousand tensors share a few dozen shapes and rules; few, because one answer may name thousands of ranks
def sources(shape: tuple[int, ...], parts: tuple[Part, ...], target: Box) -> tuple[tuple[tuple[int, tuple[int, ...], Box, Box], ...], int]:
    """What of ``target`` is stored, as (rank that wrote it, offsets of its chunk, the box inside that, the box itself); and how many
    elements are not."""
    found, missing = [], target.numel
    for rank, source, overlap in wants(LogicalTensor("", "", shape, parts), target):
        missing -= overlap.numel
        found.append((rank, source.offsets, shift(overlap, source.offsets, -1), overlap))
    return tuple(found), missing


def absent(tensor: LogicalTensor, target: Box) -> Iterator[tuple[Box, float]]:
    """The parts of ``target`` that are declared absent, and what to fill them with."""
    for part in tensor.parts:
        if isinstance(part.layout, Absent):
            overlap = intersect(part_box(tensor, part), target)
            if overlap is not None:
                yield overlap, part.layout.fill


class Need(Struct, frozen=True, gc=False):
    """A box inside one stored chunk, for the caller's ``item``: ``begin`` is the chunk's byte offset in the file."""

    item: int
    chunk: int
    sizes: tuple[int, ...]
    inner: Box
    dtype: str
    begin: int
    nbytes: int


class Slice(Struct, frozen=True, gc=False):
    """Blocks [first_block, stop_block) of a chunk, at ``offset`` of the file, and the needs that they serve."""

    chunk: int
    first_block: int
    stop_block: int
    offset: int
    nbytes: int
    needs: tuple[Need, ...]


Cut = Callable[[int], tuple[int, bool]]
"""Given a block of a chunk: the block at which the piece that it is in ends at the latest, and whether that piece is wanted."""


def slices(needs: Iterable[Need], cut_of: Callable[[Need], Cut] | None = None) -> Iterator[Slice]:
    """The blocks of one file that the needs touch, in file order, each once, in pieces of at most ``RUN_BYTES``, or as ``cut_of`` one
    of a chunk's needs says."""
    by_chunk: dict[int, list[Need]] = {}
    for need in needs:
        if need.chunk in by_chunk:
            by_chunk[need.chunk].append(need)
        else:
            by_chunk[need.chunk] = [need]
    for group in sorted(by_chunk.values(), key=_begin):
        chunk, cut = group[0], cut_of(group[0]) if cut_of else _cut_at_runs
        if chunk.nbytes <= BLOCK_BYTES:
            if cut_of is None or cut(0)[1]:
                yield Slice(chunk.chunk, 0, 1, chunk.begin, chunk.nbytes, tuple(group))
            continue
        spans = [(need, *block_span(need)) for need in group]
        for first, stop in _union([(first, stop) for _, first, stop in spans]):
            low = first
            while low < stop:
                end, wanted = cut(low)
                high = min(end, stop)
                if wanted:
                    served = tuple(need for need, a, b in spans if a < high and b > low)
                    size_bytes = min(high * BLOCK_BYTES, chunk.nbytes) - low * BLOCK_BYTES
                    yield Slice(chunk.chunk, low, high, chunk.begin + low * BLOCK_BYTES, size_bytes, served)
                low = high


def _cut_at_runs(block: int) -> tuple[int, bool]:
    per_run = RUN_BYTES // BLOCK_BYTES
    return (block // per_run + 1) * per_run, True


def _begin(group: list[Need]) -> int:
    return group[0].begin


def block_span(need: Need) -> tuple[int, int]:
    """The blocks [first, stop) of its chunk that hold the first and the last of the elements, and all between."""
    width = ITEM_BYTES[need.dtype]
    low, high = flat_span(need.sizes, need.inner)
    return low * width // BLOCK_BYTES, -(-high * width // BLOCK_BYTES)


def _union(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined


def runs(pieces: Iterable[Slice]) -> Iterator[list[Slice]]:
    """Neighbouring slices, joined while they touch and stay within ``RUN_BYTES``: each list is one read."""
    run: list[Slice] = []
    for piece in pieces:
        if run and (run[-1].offset + run[-1].nbytes != piece.offset or piece.offset + piece.nbytes - run[0].offset > RUN_BYTES):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
