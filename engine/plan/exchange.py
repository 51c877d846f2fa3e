"""Which rank reads what, where several need it: the *homes* of a checkpoint's bytes. Pure, and computed alike by all ranks.

Each block of a chunk has one home, which reads and verifies it where it is needed, and sends every other rank its elements, in the
order of the chunk. A rank of an unchanged sharding is the home of all that it needs, and so it nearly is where a sharding only
became finer or coarser.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct

from engine.format.checksum import BLOCK_BYTES, block_count
from engine.format.dtypes import ITEM_BYTES
from engine.plan.reads import Cut, Need, Slice, block_span
from engine.state.boxes import Box, flat_to_boxes, intersect

SEGMENT_BYTES = 4 * 1024 * 1024
"""What lies together in a file has one home as far as this, where it is too small to be shared."""
CELL_BYTES = 1024 * 1024
"""The most that is sent in one item."""
_SHARE_BLOCKS = 2
"""The least of a chunk that is worth a read of its own."""
PARCEL_BYTES = 16 * 1024 * 1024
"""The most that a rank sends, and is sent, at a time (but one item from each home, at the least)."""


class Homes(Struct, frozen=True, gc=False):
    """Of the files that ``saved_on`` ranks wrote, among ``world_size`` ranks that load."""

    saved_on: int
    world_size: int

    def of_writer(self, writer: int) -> range:
        """The ranks that share the files of one writer: never none, and at most one where there are fewer ranks than writers."""
        writer %= self.saved_on  # further ones wrote what does not change
        first = writer * self.world_size // self.saved_on
        return range(first, max(first + 1, (writer + 1) * self.world_size // self.saved_on))

    def shares(self, writer: int, position: int, nbytes: int) -> list[tuple[int, int]]:
        """The homes of a chunk that begins ``position`` bytes after its file's header, in order, each with the block where its share
        ends. A finer sharding cuts a chunk in as many, so that a rank's share is mostly its own."""
        ranks, blocks = self.of_writer(writer), block_count(nbytes)
        if len(ranks) > 1 and blocks >= _SHARE_BLOCKS * len(ranks):
            return [(rank, -(-blocks * (i + 1) // len(ranks))) for i, rank in enumerate(ranks)]
        return [(ranks[position // SEGMENT_BYTES % len(ranks)], blocks)]


def homes_of(need: Need, shares: list[tuple[int, int]]) -> list[int]:
    """Those of whose shares a need touches blocks."""
    if len(shares) == 1:
        return [shares[0][0]]
    first, stop = block_span(need)
    begins = [0, *(end for _, end in shares)]
    return [home for (home, end), begin in zip(shares, begins, strict=False) if begin < stop and first < end]


def cells(shares: list[tuple[int, int]], home: int) -> Cut:
    """How the blocks of a chunk are cut for ``home``: see :func:`engine.plan.reads.slices`. The same for whoever computes it."""
    per_cell = CELL_BYTES // BLOCK_BYTES

    def cut(block: int) -> tuple[int, bool]:
        owner, end = next(share for share in shares if block < share[1])
        return min(end, (block // per_cell + 1) * per_cell), owner == home

    return cut


def overlaps(piece: Slice, need: Need) -> Iterator[tuple[int, Box, Box]]:
    """What of a need lies in a piece, in the chunk's order: (elements before it in the piece, the contiguous box around it, itself)."""
    width = ITEM_BYTES[need.dtype]
    start = piece.first_block * BLOCK_BYTES // width
    position = 0
    for box in flat_to_boxes(need.sizes, start, start + piece.nbytes // width):
        overlap = intersect(box, need.inner)
        if overlap is not None:
            yield position, box, overlap
        position += box.numel


class Round:
    """What a home sends at a time: ``used`` bytes to each rank, at most ``quotas`` of them, and ``PARCEL_BYTES`` in all."""

    def __init__(self, quotas: list[int]) -> None:
        self._quotas = quotas
        self.used = [0] * len(quotas)
        self.total = 0

    def fits(self, rank: int, size_bytes: int) -> bool:
        """One item to a rank always does, so that every round gets on."""
        if self.total and self.total + size_bytes > PARCEL_BYTES:
            return False
        return not self.used[rank] or self.used[rank] + size_bytes <= self._quotas[rank]

    def add(self, rank: int, size_bytes: int) -> None:
        self.used[rank] += size_bytes
        self.total += size_bytes


def quota(homes: Iterable[int]) -> int:
    """What a rank lets each of its homes send it at a time."""
    return max(CELL_BYTES, PARCEL_BYTES // max(1, len(set(homes))))
