"""Hypothesis strategies and slow, obvious references for layouts."""

import itertools
import math

import numpy as np
from hypothesis import strategies as st

from engine.format.layout import ANY, REPLICATED, Absent, Flat, Grid, LogicalTensor, Mesh, Part, mesh_of
from engine.state.boxes import Box, held_boxes, part_box


def shapes(max_dims: int = 4, max_side: int = 6, min_side: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(min_side, max_side), max_size=max_dims).map(tuple)


@st.composite
def meshes(draw, max_dims: int = 2, max_side: int = 5) -> Mesh:
    shape = tuple(draw(st.lists(st.integers(1, max_side), min_size=1, max_size=max_dims)))
    size = math.prod(shape)
    kind = draw(st.sampled_from(["consecutive", "regular", "any"]))
    if kind == "consecutive":
        return Mesh(shape, draw(st.integers(0, 3)))
    if kind == "any":
        return mesh_of(shape, tuple(draw(st.permutations(range(size + 3)))[:size]))
    strides, step = [0] * len(shape), draw(st.integers(1, 3))
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim], step = step, step * shape[dim] + draw(st.integers(0, 2))
    return Mesh(shape, draw(st.integers(0, 3)), tuple(strides))


@st.composite
def grids(draw, ndim: int) -> Grid:
    mesh = draw(meshes())
    dims = tuple(draw(st.sampled_from([REPLICATED, *range(ndim)])) for _ in mesh.shape)
    holders = math.prod(n for d, n in zip(dims, mesh.shape, strict=True) if d == REPLICATED)
    return Grid(mesh, dims, draw(st.integers(ANY, holders - 1)))


@st.composite
def flats(draw, numel: int) -> Flat:
    """Room enough, with slack before and after, and chunks that may be smaller or larger than the tensor."""
    mesh = draw(meshes(max_dims=1, max_side=9))
    start = draw(st.integers(0, 20))
    least = max(1, -(-(start + numel) // mesh.size))
    return Flat(mesh, start, draw(st.integers(least, least + 10)))


@st.composite
def tensors(draw, dtype: str = "F32", absent: bool = True) -> LogicalTensor:
    """One part, or two that split the first dimension."""
    shape = draw(shapes())
    places: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    if shape and min(shape) > 0 and shape[0] > 1 and draw(st.booleans()):
        cut, rest = draw(st.integers(1, shape[0] - 1)), shape[1:]
        zeros = (0,) * len(rest)
        places = [((0, *zeros), (cut, *rest)), ((cut, *zeros), (shape[0] - cut, *rest))]
    parts = []
    for offsets, sizes in places:
        inner = sizes or shape
        kinds = [grids(len(inner)), flats(math.prod(inner))]
        if absent and len(places) == 2:
            kinds.append(st.builds(Absent))
        parts.append(Part(draw(st.one_of(kinds)), offsets, sizes))
    return LogicalTensor("t", dtype, shape, tuple(parts))


@st.composite
def boxes_in(draw, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(0, n - o)) for o, n in zip(offsets, shape, strict=True)))


def ranks_of(part: Part) -> list[int]:
    if isinstance(part.layout, Absent):
        return []
    return sorted(part.layout.mesh.rank_at(position) for position in range(part.layout.mesh.size))


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


def counts(shape: tuple[int, ...], boxes) -> np.ndarray:
    """How many of the boxes hold each element."""
    found = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        assert all(o >= 0 and o + n <= extent for o, n, extent in zip(box.offsets, box.sizes, shape, strict=True)), f"{box} is outside {shape}"
        found[region(box)] += 1
    return found


def inside(tensor: LogicalTensor, part: Part) -> np.ndarray:
    """1 for the elements of a part."""
    return counts(tensor.shape, [part_box(tensor, part)])


def replicas(part: Part) -> int:
    grid = part.layout
    assert isinstance(grid, Grid)
    return math.prod(n for d, n in zip(grid.dims, grid.mesh.shape, strict=True) if d == REPLICATED)


def all_held(tensor: LogicalTensor) -> list[Box]:
    return list(itertools.chain.from_iterable(held_boxes(tensor, part, rank) for part in tensor.parts for rank in ranks_of(part)))


class Bytes:
    """A file in memory, as a storage's reader."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)
        self.bytes_read = 0

    def read_into(self, offset: int, target: memoryview) -> None:
        assert 0 <= offset <= offset + len(target) <= self.size_bytes, "a read past the end"
        target[:] = self._data[offset : offset + len(target)]
        self.bytes_read += len(target)

    def close(self) -> None: ...
