"""Geometry: flat intervals, boxes, and the boxes that a layout rule gives each rank. Pure integers, no tensors."""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypeGuard

from msgspec import Struct

from engine.errors import LayoutError
from engine.format.layout import ANY, REPLICATED, Absent, Flat, Grid, Layout, LogicalTensor, Part


class Box(Struct, frozen=True, gc=False):
    """An axis-aligned block of an N-D tensor: where it starts and how large it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def flat_to_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements [start, stop) of a row-major tensor as boxes, in flat order.

    At most 2N−1 of them for N dimensions, each contiguous in the flat order: a box is a view of the interval, not a copy.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,) if shape else (), (stop - start,) if shape else ())]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return _in_row(shape, first, head, tail)
    boxes = []
    if head:
        boxes += _in_row(shape, first, head, inner)
        first += 1
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    if tail:
        boxes += _in_row(shape, last, 0, tail)
    return boxes


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *b.offsets), (1, *b.sizes)) for b in flat_to_boxes(shape[1:], start, stop)]


def flat_start(shape: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    """The row-major position of an element."""
    position = 0
    for extent, offset in zip(shape, offsets, strict=True):
        position = position * extent + offset
    return position


def flat_span(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """The shortest interval [start, stop) of the row-major order that holds all of a non-empty box."""
    start = flat_start(shape, box.offsets)
    return start, flat_start(shape, tuple(o + s - 1 for o, s in zip(box.offsets, box.sizes, strict=True))) + 1


def intersect(a: Box, b: Box) -> Box | None:
    """The common part, or None if it has no element."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    sizes = tuple(min(ao + as_, bo + bs) - o for ao, as_, bo, bs, o in zip(a.offsets, a.sizes, b.offsets, b.sizes, offsets, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def shift(box: Box, by: tuple[int, ...], sign: int = 1) -> Box:
    """``by`` may be empty, for no shift: the offsets of a part that is the whole tensor."""
    return Box(tuple(o + sign * d for o, d in zip(box.offsets, by, strict=True)), box.sizes) if by else box


def part_box(tensor: LogicalTensor, part: Part) -> Box:
    return _place(tensor.shape, part)


def _place(shape: tuple[int, ...], part: Part) -> Box:
    return Box(part.offsets, part.sizes) if part.sizes else whole(shape)


def grid_box(grid: Grid, sizes: tuple[int, ...], position: int) -> Box:
    """The box at a mesh position (row-major), within ``sizes``. Pieces past the end are empty, as DTensor's are."""
    offsets, extent = [0] * len(sizes), list(sizes)
    for dim, index, count in zip(grid.dims, unravel(position, grid.mesh.shape), grid.mesh.shape, strict=True):
        if dim == REPLICATED:
            continue
        piece = -(-extent[dim] // count)
        begin = min(index * piece, extent[dim])
        offsets[dim] += begin
        extent[dim] = min(piece, extent[dim] - begin)
    return Box(tuple(offsets), tuple(extent))


def unravel(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for extent in reversed(shape):
        position, i = divmod(position, extent)
        index.append(i)
    return tuple(reversed(index))


def holder_number(grid: Grid, position: int) -> int:
    """Which of the holders of its piece a mesh position is: row-major over the replicated mesh dimensions."""
    number = 0
    for dim, index, count in zip(grid.dims, unravel(position, grid.mesh.shape), grid.mesh.shape, strict=True):
        if dim == REPLICATED:
            number = number * count + index
    return number


def holders(grid: Grid) -> int:
    """How many ranks hold each piece."""
    return math.prod(count for dim, count in zip(grid.dims, grid.mesh.shape, strict=True) if dim == REPLICATED)


def flat_interval(flat: Flat, numel: int, position: int) -> tuple[int, int]:
    """The elements [start, stop) of the tensor that lie in the chunk at a mesh position."""
    begin = position * flat.chunk - flat.start
    return min(max(begin, 0), numel), min(max(begin + flat.chunk, 0), numel)


def held_boxes(tensor: LogicalTensor, part: Part, rank: int) -> list[Box]:
    """The non-empty boxes of ``part`` that ``rank`` holds, in the tensor's coordinates, in the order of its local storage."""
    return list(_held_boxes(tensor.shape, part, rank))


@lru_cache(maxsize=4096)  # ten thousand tensors share a few dozen shapes and rules
def _held_boxes(shape: tuple[int, ...], part: Part, rank: int) -> tuple[Box, ...]:
    position = None if isinstance(part.layout, Absent) else part.layout.mesh.position_of(rank)
    return () if position is None else boxes_at(shape, part, position)


@lru_cache(maxsize=4096)
def boxes_at(shape: tuple[int, ...], part: Part, position: int) -> tuple[Box, ...]:
    """The non-empty boxes of ``part`` that the rank at a position of its mesh holds; an empty part has one, see :func:`positions`."""
    layout, place = part.layout, _place(shape, part)
    if isinstance(layout, Absent):
        return ()
    if _is_replicated(layout):
        return (place,)
    if isinstance(layout, Flat):
        boxes = flat_to_boxes(place.sizes, *flat_interval(layout, place.numel, position))
        if place.numel == 0 and position == 0:
            boxes = [whole(place.sizes)]
    else:
        box = grid_box(layout, place.sizes, position)
        boxes = [box] if box.numel or _is_only_empty(layout, place, position) else []
    return tuple(shift(box, part.offsets) for box in boxes)


def _is_replicated(layout: Layout) -> TypeGuard[Grid]:
    return isinstance(layout, Grid) and layout.dims == (REPLICATED,)


def _is_only_empty(grid: Grid, place: Box, position: int) -> bool:
    """An empty tensor is still stored, once: by the first cell. (Stock readers reject further empty boxes.)"""
    return place.numel == 0 and all(i == 0 for i, d in zip(unravel(position, grid.mesh.shape), grid.dims, strict=True) if d != REPLICATED)


def held_numel(tensor: LogicalTensor, part: Part, rank: int) -> int:
    """How many elements of ``part`` ``rank`` holds."""
    layout = part.layout
    if isinstance(layout, Flat):
        start, stop = held_interval(tensor, part, layout, rank)
        return stop - start
    return sum(box.numel for box in _held_boxes(tensor.shape, part, rank))


def held_interval(tensor: LogicalTensor, part: Part, layout: Flat, rank: int) -> tuple[int, int]:
    """The elements [start, stop) of ``part``, laid out flat, that ``rank`` holds."""
    position = layout.mesh.position_of(rank)
    return (0, 0) if position is None else flat_interval(layout, math.prod(part.sizes or tensor.shape), position)


def written_boxes(tensor: LogicalTensor, part: Part, rank: int) -> list[Box]:
    """The boxes that ``rank`` writes: what it holds, where it is the assigned writer."""
    layout = part.layout
    if isinstance(layout, Grid):
        position = layout.mesh.position_of(rank)
        if position is None or holder_number(layout, position) != max(layout.writer, 0):
            return []
    return held_boxes(tensor, part, rank)


def positions(tensor: LogicalTensor, part: Part) -> Iterator[tuple[int, int]]:
    """(rank, its mesh position) for each rank that writes a box of ``part``. Costs time in proportion to their number."""
    layout, place = part.layout, part_box(tensor, part)
    if isinstance(layout, Absent):
        return
    sizes = place.sizes if place.numel else (1,) * len(place.sizes)  # of an empty part the first cell has the only box
    if isinstance(layout, Grid):
        found: Iterable[int] = _cells(layout, sizes, whole(sizes))
    else:
        found = range(layout.start // layout.chunk, (layout.start + place.numel - 1) // layout.chunk + 1) if place.numel else (0,)
    for position in found:
        yield layout.mesh.rank_at(position), position


def writers(tensor: LogicalTensor, part: Part, target: Box) -> Iterator[tuple[int, Box, Box]]:
    """(rank, the box it wrote, its overlap with ``target``) for each written box of ``part`` that overlaps: computed, not searched."""
    yield from _writers(tensor.shape, part, target)


@lru_cache(maxsize=64)  # few, because one answer may name thousands of ranks
def _writers(shape: tuple[int, ...], part: Part, target: Box) -> tuple[tuple[int, Box, Box], ...]:
    return tuple(_overlaps(shape, part, target))


def _overlaps(shape: tuple[int, ...], part: Part, target: Box) -> Iterator[tuple[int, Box, Box]]:
    layout, place = part.layout, _place(shape, part)
    wanted = target if target == place else intersect(place, target)
    if wanted is None or 0 in wanted.sizes or isinstance(layout, Absent):
        return
    if _is_replicated(layout):
        yield layout.mesh.rank_at(max(layout.writer, 0)), place, wanted
        return
    local = shift(wanted, part.offsets, -1)
    if isinstance(layout, Flat):
        low, high = flat_span(place.sizes, local)
        last = min((layout.start + high - 1) // layout.chunk, layout.mesh.size - 1)
        found: Iterable[int] = range((layout.start + low) // layout.chunk, last + 1)
    else:
        found = _cells(layout, place.sizes, local)
    for position in found:
        rank = layout.mesh.rank_at(position)
        for box in boxes_at(shape, part, position):
            overlap = intersect(box, wanted)
            if overlap is not None:
                yield rank, box, overlap


def _cells(grid: Grid, sizes: tuple[int, ...], target: Box) -> list[int]:
    """Mesh positions of the assigned writers whose cells overlap ``target``, which is not empty."""
    counts = tuple(count for dim, count in zip(grid.dims, grid.mesh.shape, strict=True) if dim == REPLICATED)
    holder = iter(unravel(max(grid.writer, 0), counts))
    cells = [(0, whole(sizes))]
    for dim, count in zip(grid.dims, grid.mesh.shape, strict=True):
        if dim == REPLICATED:
            index = next(holder)
            cells = [(position * count + index, box) for position, box in cells]
        else:
            cells = [(position * count + i, piece) for position, box in cells for i, piece in _pieces(box, dim, count, target)]
    return [position for position, _ in cells]


def _pieces(box: Box, dim: int, count: int, target: Box) -> Iterator[tuple[int, Box]]:
    """Of the pieces into which a mesh dimension cuts a box, those that overlap ``target``."""
    begin, extent = box.offsets[dim], box.sizes[dim]
    size = max(1, -(-extent // count))
    low, high = max(target.offsets[dim] - begin, 0), min(target.offsets[dim] + target.sizes[dim] - begin, extent)
    for i in range(low // size, (high - 1) // size + 1):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim], sizes[dim] = begin + i * size, min(size, extent - i * size)
        yield i, Box(tuple(offsets), tuple(sizes))


def check_tiling(tensor: LogicalTensor) -> None:
    """Raises :class:`LayoutError` unless the parts tile the tensor and each part's rule covers all of it."""
    problem = _tiling_problem(tensor.shape, tensor.parts)
    if problem:
        raise LayoutError(f"{tensor.name}: {problem}")


@lru_cache(maxsize=256)  # ten thousand tensors share a few dozen; few, because parts may list thousands of ranks
def _tiling_problem(shape: tuple[int, ...], parts: tuple[Part, ...]) -> str:
    """Why the parts do not tile a tensor of this shape; empty where they do."""
    places = [_place(shape, part) for part in parts]
    if any(len(part.offsets) != len(part.sizes) for part in parts):
        return "a part has not as many offsets as sizes"
    if len(places) == 1 and not parts[0].sizes:
        return _rule_problem(parts[0].layout, places[0])
    for place in places:
        fits = len(place.sizes) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(place.offsets, place.sizes, shape, strict=True)
        )
        if not fits:
            return f"a part at {place.offsets} of size {place.sizes} is outside its shape {shape}"
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            if intersect(a, b) is not None:
                return f"its parts at {a.offsets} and {b.offsets} overlap"
    if sum(place.numel for place in places) != math.prod(shape):
        return f"its parts cover {sum(p.numel for p in places)} of {math.prod(shape)} elements"
    problems = (_rule_problem(part.layout, place) for part, place in zip(parts, places, strict=True))
    return next(filter(None, problems), "")


def _rule_problem(layout: Layout, place: Box) -> str:
    if isinstance(layout, Absent):
        return ""
    if not layout.mesh.is_sound:
        return f"a mesh of shape {layout.mesh.shape} whose ranks are not one a position"
    if isinstance(layout, Flat):
        room = layout.chunk * layout.mesh.size - layout.start
        if layout.start < 0 or layout.chunk < 1 or room < place.numel:
            return f"{place.numel} elements at {layout.start} do not fit a flat buffer of {layout.mesh.size} chunks of {layout.chunk}"
    elif len(layout.dims) != len(layout.mesh.shape) or any(d != REPLICATED and not 0 <= d < len(place.sizes) for d in layout.dims):
        return f"mesh {layout.mesh.shape} cannot cut dimensions {layout.dims} of {place.sizes}"
    elif not ANY <= layout.writer < holders(layout):
        return f"writer {layout.writer} is none of the {holders(layout)} that hold a piece"
    return ""
