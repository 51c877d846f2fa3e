"""Where the elements of a logical tensor live: a rule that every rank knows, instead of a list of every rank's boxes.

A rule stays a few bytes at any world size, tiles its tensor by construction, and lets a reader compute which ranks' indexes it
needs. ``engine.state.boxes`` turns rules into boxes.
"""

from msgspec import Struct

REPLICATED = -1
"""In :attr:`Grid.dims`: a mesh dimension along which every rank holds the same."""

ANY = -1
"""In :attr:`Grid.writer`: which of the holders writes has not been assigned yet."""


class Mesh(Struct, frozen=True, array_like=True, gc=False):
    """Ranks arranged in a grid, row-major. Empty ``ranks`` stand for 0, 1, 2, …"""

    shape: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n

    def rank_at(self, position: int) -> int:
        return self.ranks[position] if self.ranks else position

    def position_of(self, rank: int) -> int | None:
        """The row-major position of a rank, or None if it is not of this mesh."""
        if not self.ranks:
            return rank if rank < self.size else None
        return self.ranks.index(rank) if rank in self.ranks else None


class Grid(Struct, frozen=True, array_like=True, tag="grid", gc=False):
    """Split as DTensor splits: mesh dimension i cuts tensor dimension ``dims[i]`` into ceil-sized pieces, in mesh order.

    With only ``REPLICATED`` dims every rank of the mesh holds all. ``writer`` numbers the holders of one piece (row-major over
    the replicated mesh dimensions) and names the one that writes it.
    """

    mesh: Mesh
    dims: tuple[int, ...]
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
    """One box of a logical tensor and how it is laid out. Empty offsets and sizes: the whole tensor."""

    layout: Layout
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class LogicalTensor(Struct, frozen=True, array_like=True, gc=False):
    """A tensor of the training state with its global shape. Its parts tile it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
