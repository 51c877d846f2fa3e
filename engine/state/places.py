"""Which parts of a tensor overlap a box, found by their first rows instead of one by one: a tensor may have a hundred thousand."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate

from engine.errors import CheckpointCorrupt
from engine.format.layout import LogicalTensor, Part
from engine.state.boxes import Box, intersect, part_box

MAX_LOOKS = 1 << 21


class Places:
    """The parts of one tensor. Rows that follow one another, as training lays parts out, are found by bisection.

    Raises :class:`CheckpointCorrupt` after :data:`MAX_LOOKS` at parts that cross each other in any other way.
    """

    def __init__(self, tensor: LogicalTensor) -> None:
        found = [(part, part_box(tensor, part)) for part in tensor.parts]
        self._found = sorted(found, key=lambda pair: pair[1].offsets[:1])
        self._begins = [_rows(place)[0] for _, place in self._found]
        self._ends = list(accumulate((_rows(place)[1] for _, place in self._found), max))
        self._name, self._looks = tensor.name, 0

    def overlapping(self, box: Box) -> Iterator[tuple[Part, Box]]:
        """Each part that overlaps ``box``, with the overlap."""
        begin, end = _rows(box)
        first, stop = bisect_right(self._ends, begin), bisect_left(self._begins, end)
        self._looks += max(0, stop - first)
        if self._looks > MAX_LOOKS:
            raise CheckpointCorrupt(
                f"{self._name} is laid out in {len(self._found)} parts that are not rows one after the other: too many to look up"
            )
        for part, place in self._found[first:stop]:
            common = intersect(place, box)
            if common is not None:
                yield part, common


def _rows(box: Box) -> tuple[int, int]:
    return (box.offsets[0], box.offsets[0] + box.sizes[0]) if box.sizes else (0, 1)
