"""Which rank reads what, where several need it: the *homes* of a checkpoint's bytes. Pure, and computed alike by all ranks.

A chunk is cut into fixed pieces, from its first block on. Each piece has one home, which reads and verifies what is needed of it
and sends every other rank its elements, in the order of the chunk. A rank of an unchanged sharding is the home of what it needs.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct

from engine.format.checksum import BLOCK_BYTES
from engine.format.dtypes import ITEM_BYTES
from engine.plan.reads import Need, Slice, block_span
from engine.state.boxes import Box, flat_to_boxes, intersect

PIECE_BYTES = 4 * 1024 * 1024
"""What one rank reads of a file before it is the next one's turn, where a file has several homes."""
CELL_BYTES = 1024 * 1024
"""The most that is sent in one item: divides ``PIECE_BYTES``."""
PARCEL_BYTES = 16 * 1024 * 1024
"""The most that a rank sends, and is sent, at a time (but one item from each home, at the least)."""


class Homes(Struct, frozen=True, gc=False):
    """Of the files that ``saved_on`` ranks wrote, among ``world_size`` ranks that load."""

    saved_on: int
    world_size: int

    def of_writer(self, writer: int) -> range:
        """The ranks that share the files of one writer: never none, and at most one where there are fewer ranks than writers."""
        first = writer * self.world_size // self.saved_on
        return range(first, max(first + 1, (writer + 1) * self.world_size // self.saved_on))

    def at(self, writer: int, position: int) -> int:
        """The home of what begins ``position`` bytes after a file's header. What is small and lies together has one home."""
        ranks = self.of_writer(writer)
        return ranks[position // PIECE_BYTES % len(ranks)]

    def of_block(self, writer: int, position: int, block: int) -> int:
        """The home of a block in the chunk that begins at ``position``."""
        return self.at(writer, position + block * BLOCK_BYTES // PIECE_BYTES * PIECE_BYTES)

    def of_need(self, writer: int, position: int, need: Need) -> set[int]:
        """All homes of a need, whose chunk begins at ``position``."""
        ranks = self.of_writer(writer)
        if len(ranks) == 1:
            return {ranks[0]}
        first, stop = block_span(need)
        per_piece = PIECE_BYTES // BLOCK_BYTES
        pieces = range(first // per_piece, min((stop - 1) // per_piece, first // per_piece + len(ranks)) + 1)
        return {self.at(writer, position + piece * PIECE_BYTES) for piece in pieces}


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
