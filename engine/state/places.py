"""Which parts of a tensor overlap a box, found by their first rows instead of one by one: a tensor
may have a hundred thousand."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate

from engine.errors import CheckpointCorrupt
from engine.format.layout import LogicalTensor, Part
from engine.state.boxes import Box, intersect, part_box

FREE_LOOKS = 1 << 18


class Places:
    """The parts of one tensor. Rows that follow one another, as training lays parts out, are found
    by bisection.

    Of parts that cross each other in any other way, it looks at some in vain: after
    :data:`FREE_LOOKS` more than a few for each part and each box, it raises
    :class:`CheckpointCorrupt`.
    """

    def __init__(self, tensor: LogicalTensor) -> None:
        found = [(part, part_box(tensor, part)) for part in tensor.parts]
        self._found = sorted(found, key=lambda pair: pair[1].offsets[:1])
        self._begins = [_rows(place)[0] for _, place in self._found]
        self._ends = list(accumulate((_rows(place)[1] for _, place in self._found), max))
        self._name, self._left = tensor.name, FREE_LOOKS + 2 * len(found)

    def overlapping(self, box: Box) -> Iterator[tuple[Part, Box]]:
        """Each part that overlaps ``box``, with the overlap."""
        begin, end = _rows(box)
        first, stop = bisect_right(self._ends, begin), bisect_left(self._begins, end)
        self._left += 4 - max(0, stop - first)
        if self._left < 0:
            raise CheckpointCorrupt(
                f"{self._name} is laid out in {len(self._found)} parts that are not rows one after the other: too many to look up"
            )
        for part, place in self._found[first:stop]:
            common = intersect(place, box)
            if common is not None:
                yield part, common


def _rows(box: Box) -> tuple[int, int]:
    return (box.offsets[0], box.offsets[0] + box.sizes[0]) if box.sizes else (0, 1)
