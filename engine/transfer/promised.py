"""What the layouts of a manifest promise each writer's index, box by box."""

from array import array
from collections import defaultdict
from collections.abc import Sequence

from engine.errors import CheckpointCorrupt
from engine.format.layout import LogicalTensor
from engine.state.boxes import boxes_at, positions

CHUNK_BYTES = 24
"""No chunk takes less in an index."""

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Promised:
    """Costs time and memory in proportion to the boxes; there are ``most``, as many as the indexes
    have room for.

    Raises :class:`CheckpointCorrupt` where a few bytes of layouts promise more: they may name every
    writer for every tensor.
    """

    def __init__(self, tensors: Sequence[LogicalTensor], most: int) -> None:
        self._tensors = tensors
        self._places = defaultdict[int, "array[int]"](lambda: array("q"))
        """By writer: tensor, part and mesh position of each of its boxes, one after the other."""
        for number, tensor in enumerate(tensors):
            for i, part in enumerate(tensor.parts):
                for writer, position in positions(tensor, part):
                    if most <= 0:
                        raise CheckpointCorrupt("its layouts promise more boxes than the indexes have room for")
                    self._places[writer].extend((number, i, position))
                    most -= 1

    def of(self, writer: int) -> dict[int, Boxes]:
        """By tensor, in the order of its parts."""
        found: dict[int, Boxes] = {}
        places = iter(self._places.pop(writer, ()))
        for number, i, position in zip(places, places, places, strict=True):
            tensor = self._tensors[number]
            boxes = boxes_at(tensor.shape, tensor.parts[i], position)
            found.setdefault(number, []).extend((box.offsets, box.sizes) for box in boxes)
        return found
