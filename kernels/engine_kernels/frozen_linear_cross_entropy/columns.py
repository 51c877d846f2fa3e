"""Where the classes lie in a buffer of logits."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """``[0, base)`` frozen, then padding to a multiple of ``align``, then ``rows`` trainable classes from ``first`` on, then padding again up
    to ``width``: vocabularies are odd, and a row that begins at an odd place is loaded a number at a time."""

    base: int
    rows: int
    align: int = 1

    @property
    def classes(self) -> int:
        return self.base + self.rows

    @property
    def first(self) -> int:
        return -(-self.base // self.align) * self.align

    @property
    def width(self) -> int:
        return self.first + -(-self.rows // self.align) * self.align

    def spread(self, vector: Tensor) -> Tensor:
        """A vector of all classes with the padding, which is 0."""
        if self.width == self.classes:
            return vector
        spread = vector.new_zeros(self.width)
        spread[: self.base] = vector[: self.base]
        spread[self.first : self.first + self.rows] = vector[self.base :]
        return spread

    def frozen(self, z: Tensor) -> Tensor:
        """The frozen classes' part of logits ``z`` [n, width]."""
        return z[:, : self.base]

    def trainable(self, z: Tensor) -> Tensor:
        return z[:, self.first : self.first + self.rows]
