"""Which rank writes what. Every rank computes the same answer from the same list of logical tensors: nothing is exchanged."""

import heapq
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import repeat

from msgspec.structs import replace

from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import ANY, REPLICATED, Absent, Grid, LogicalTensor, Part, shifted

SMALL_BYTES = 64 * 1024
"""Replicated tensors below this are all written by the first holder: a reader then finds them in one place."""

CUT_BYTES = 8 * 1024 * 1024
"""Replicated tensors from this size on are cut by rows over their holders, so that one large one does not burden one rank."""


def assign_writers(tensors: Iterable[LogicalTensor]) -> tuple[LogicalTensor, ...]:
    """Give every replicated part its writer, spreading bytes over the ranks that hold it; leave assigned ones as they are."""
    loads: dict[int, list[tuple[int, int]]] = {}  # holders -> heap of (bytes so far, holder)
    known: dict[tuple[object, ...], tuple[Part, ...]] = {}  # of tensors that add to no load: most share a few shapes and layouts
    assigned = []
    for tensor in tensors:
        kind = (tensor.dtype, tensor.shape, tensor.parts)
        parts = known.get(kind)
        if parts is None:
            parts = _assign(tensor, loads)
            if not any(map(_adds_load, tensor.parts, repeat(tensor))):
                known[kind] = parts
        assigned.append(LogicalTensor(tensor.name, tensor.dtype, tensor.shape, parts))
    return tuple(assigned)


Frozen = tuple[str, tuple[int, ...]]
"""A part of a tensor that nobody trains: the tensor's name, the part's offsets."""

FROZEN_BYTES = 1024 * 1024
"""Less than this in all is not worth files of its own."""


def place_frozen(tensors: Sequence[LogicalTensor], frozen: AbstractSet[Frozen], world_size: int) -> tuple[LogicalTensor, ...]:
    """Tensors with writers, of which the parts in ``frozen`` (by tensor and offsets) go to the further writers from ``world_size`` on: what
    a rank writes of them lies in files of their own."""
    if not frozen:
        return tuple(tensors)
    if sum(part_bytes(tensor, part) for tensor in tensors for part in tensor.parts if (tensor.name, part.offsets) in frozen) < FROZEN_BYTES:
        return tuple(tensors)
    return tuple(_placed(tensor, frozen, world_size) for tensor in tensors)


def _placed(tensor: LogicalTensor, frozen: AbstractSet[Frozen], world_size: int) -> LogicalTensor:
    if not any((tensor.name, part.offsets) in frozen for part in tensor.parts):
        return tensor
    parts = []
    for part in tensor.parts:
        layout = part.layout
        if (tensor.name, part.offsets) in frozen and not isinstance(layout, Absent):
            part = replace(part, layout=replace(layout, mesh=shifted(layout.mesh, world_size)))  # noqa: PLW2901
        parts.append(part)
    return replace(tensor, parts=tuple(parts))


def part_bytes(tensor: LogicalTensor, part: Part) -> int:
    return math.prod(part.sizes or tensor.shape) * ITEM_BYTES[tensor.dtype]


def is_frozen(tensor: LogicalTensor, world_size: int) -> bool:
    """Whether any part goes to a further writer."""
    return any(not isinstance(part.layout, Absent) and part.layout.mesh.rank_at(0) >= world_size for part in tensor.parts)


def _adds_load(part: Part, tensor: LogicalTensor) -> bool:
    """Whether the writer depends on what other tensors have been given."""
    layout = part.layout
    return isinstance(layout, Grid) and layout.writer == ANY and _holders(layout) > 1 and part_bytes(tensor, part) >= SMALL_BYTES


def _holders(layout: Grid) -> int:
    return math.prod(n for d, n in zip(layout.dims, layout.mesh.shape, strict=True) if d == REPLICATED)


def _assign(tensor: LogicalTensor, loads: dict[int, list[tuple[int, int]]]) -> tuple[Part, ...]:
    parts = []
    for part in tensor.parts:
        layout = part.layout
        if isinstance(layout, Grid) and layout.writer == ANY:
            holders, sizes, size_bytes = _holders(layout), part.sizes or tensor.shape, part_bytes(tensor, part)
            if size_bytes >= CUT_BYTES and layout.dims == (REPLICATED,) and sizes[0] >= holders > 1:
                layout = Grid(layout.mesh, (0,), 0)
            else:
                layout = replace(layout, writer=_writer(size_bytes, holders, loads))
        parts.append(replace(part, layout=layout))
    return tuple(parts)


def _writer(size_bytes: int, holders: int, loads: dict[int, list[tuple[int, int]]]) -> int:
    if holders == 1 or size_bytes < SMALL_BYTES:
        return 0
    heap = loads.setdefault(holders, [(0, holder) for holder in range(holders)])
    load, holder = heap[0]
    heapq.heapreplace(heap, (load + size_bytes, holder))
    return holder
