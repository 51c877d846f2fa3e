"""Where the elements of a logical tensor live: a rule that every rank knows, instead of a list of every rank's boxes.

A rule stays a few bytes at any world size, tiles its tensor by construction, and lets a reader compute which ranks' indexes it
needs. ``engine.state.boxes`` turns rules into boxes.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

from msgspec import Meta, Struct

from engine.format.dtypes import ITEM_BYTES

REPLICATED = -1
"""In :attr:`Grid.dims`: a mesh dimension along which every rank holds the same."""

ANY = -1
"""In :attr:`Grid.writer`: which of the holders writes has not been assigned yet."""

MAX_DIMS = 64
"""As many dimensions as PyTorch and NumPy know."""

Dims = Annotated[tuple[int, ...], Meta(max_length=MAX_DIMS)]
"""One number a dimension. A longer list is refused before it is decoded."""


class Mesh(Struct, frozen=True, array_like=True, gc=False):
    """Ranks arranged in a grid, row-major: the rank at index (i, j, …) is ``first + i·strides[0] + j·strides[1] + …``.

    Process groups of training jobs are regular, so this stays a few bytes at any size. Empty ``strides`` are the row-major ones
    (ranks first, first + 1, …). ``ranks`` lists them one by one where they are not regular, and overrules the rest. Make one with
    :func:`mesh_of`.
    """

    shape: Dims
    first: int = 0
    strides: Dims = ()
    ranks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rank_at(self, position: int) -> int:
        if self.ranks:
            return self.ranks[position]
        if not self.strides:
            return self.first + position
        rank = self.first
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            position, index = divmod(position, extent)
            rank += index * stride
        return rank

    def position_of(self, rank: int) -> int | None:
        """The row-major position of a rank, or None if it is not of this mesh."""
        if self.ranks:
            return self.ranks.index(rank) if rank in self.ranks else None
        left = rank - self.first
        if not self.strides:
            return left if 0 <= left < self.size else None
        indices = [0] * len(self.shape)
        for dim in sorted((d for d, extent in enumerate(self.shape) if extent > 1), key=lambda d: -self.strides[d]):
            indices[dim], left = divmod(left, self.strides[dim])
            if not 0 <= indices[dim] < self.shape[dim]:
                return None
        position = 0
        for extent, index in zip(self.shape, indices, strict=True):
            position = position * extent + index
        return position if left == 0 else None

    @property
    def largest(self) -> int:
        """The highest rank, of a mesh that is sound."""
        if self.ranks:
            return max(self.ranks)
        strides = self.strides or _row_major(self.shape)
        return self.first + sum((extent - 1) * stride for extent, stride in zip(self.shape, strides, strict=True))

    @property
    def is_sound(self) -> bool:
        """Every position has a rank of its own. Regular strides must nest: one step of a dimension is longer than all of those
        inside it."""
        if not 0 < len(self.shape) <= MAX_DIMS or min(self.shape) < 1 or self.first < 0:
            return False
        if self.ranks:
            return len(self.ranks) == self.size == len(set(self.ranks)) and min(self.ranks) >= 0
        if not self.strides:
            return True
        if len(self.strides) != len(self.shape) or min(self.strides) < 1:
            return False
        nested = sorted((stride, extent) for stride, extent in zip(self.strides, self.shape, strict=True) if extent > 1)
        return all(outer >= stride * extent for (stride, extent), (outer, _) in pairwise(nested))


def shifted(mesh: Mesh, by: int) -> Mesh:
    """The same mesh with every number ``by`` higher."""
    return Mesh(mesh.shape, mesh.first + by, mesh.strides, tuple(rank + by for rank in mesh.ranks)) if by else mesh


@lru_cache(maxsize=256)
def mesh_of(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Mesh:
    """The shortest description of ``ranks`` (row-major) in a grid of ``shape``."""
    if ranks == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return Mesh(shape, ranks[0])
    strides = tuple(ranks[step] - ranks[0] if extent > 1 else 1 for extent, step in zip(shape, _row_major(shape), strict=True))
    regular = Mesh(shape, ranks[0], strides)
    if regular.is_sound and all(regular.rank_at(i) == rank for i, rank in enumerate(ranks)):
        return regular
    return Mesh(shape, ranks=ranks)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Grid(Struct, frozen=True, array_like=True, tag="grid", gc=False):
    """Split as DTensor splits: mesh dimension i cuts tensor dimension ``dims[i]`` into ceil-sized pieces, in mesh order.

    With only ``REPLICATED`` dims every rank of the mesh holds all. ``writer`` numbers the holders of one piece (row-major over
    the replicated mesh dimensions) and names the one that writes it.
    """

    mesh: Mesh
    dims: Dims
    writer: int = ANY


class Flat(Struct, frozen=True, array_like=True, tag="flat", gc=False):
    """Split as ZeRO splits: the tensor lies, row-major, at ``start`` of a flat buffer cut into ``chunk`` elements a rank."""

    mesh: Mesh
    start: int
    chunk: int


class Absent(Struct, frozen=True, array_like=True, tag="absent", gc=False):
    """Declared not to exist: nothing is stored, a reader fills with ``fill``."""

    fill: float = 0.0


Layout = Grid | Flat | Absent


class Part(Struct, frozen=True, array_like=True, gc=False):
    """One box of a logical tensor and how it is laid out. Empty offsets and sizes: the whole tensor.

    ``narrow``, where it is not empty, is the smaller dtype that training keeps this box in: it is stored widened to the tensor's.
    """

    layout: Layout
    offsets: Dims = ()
    sizes: Dims = ()
    narrow: str = ""


class LogicalTensor(Struct, frozen=True, array_like=True, gc=False):
    """A tensor of the training state with its global shape. Its parts tile it."""

    name: str
    dtype: str
    shape: Dims
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        """Of all elements, absent ones included."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
