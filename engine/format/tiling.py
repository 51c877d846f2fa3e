"""Do boxes tile a tensor exactly? In time linear in their number, whatever their arrangement."""

import os
from collections.abc import Iterable

_PRIME = 2**127 - 1


class Tiling:
    """Gives boxes numbers, such that those of boxes which tile another box add up to its number, modulo a prime.

    Boxes tile a tensor if their indicator functions add up to the tensor's, which is so if their corners, each with the sign of its
    parity, cancel but for the tensor's own. The corners are added up with random weights, a product of one number for each
    coordinate: sums that agree by accident have a chance below 2⁻¹²⁰, and who makes the boxes cannot aim for it. An empty box has
    the number 0.
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int], int] = {}

    def number(self, offsets: Iterable[int], sizes: Iterable[int]) -> int:
        product = 1
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            product = product * (self._at(dim, offset + size) - self._at(dim, offset)) % _PRIME
        return product

    def same(self, total: int, number: int) -> bool:
        return (total - number) % _PRIME == 0

    def _at(self, dim: int, coordinate: int) -> int:
        found = self._weights.get((dim, coordinate))
        if found is None:  # not from ``random``: its state belongs to the training run
            found = self._weights[dim, coordinate] = int.from_bytes(os.urandom(15), "little")
        return found


def tiles(shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether (offsets, sizes) tile a tensor; boxes are within it."""
    tiling = Tiling()
    total = sum(tiling.number(offsets, sizes) for offsets, sizes in boxes)
    return tiling.same(total, tiling.number((0,) * len(shape), shape))
