"""Which rank writes what. Every rank computes the same answer from the same list of logical tensors: nothing is exchanged."""

import heapq
import math
from collections.abc import Iterable

from msgspec.structs import replace

from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import ANY, REPLICATED, Grid, LogicalTensor

SMALL_BYTES = 64 * 1024
"""Replicated tensors below this are all written by the first holder: a reader then finds them in one place."""

CUT_BYTES = 8 * 1024 * 1024
"""Replicated tensors from this size on are cut by rows over their holders, so that one large one does not burden one rank."""


def assign_writers(tensors: Iterable[LogicalTensor]) -> tuple[LogicalTensor, ...]:
    """Give every replicated part its writer, spreading bytes over the ranks that hold it; leave assigned ones as they are."""
    loads: dict[int, list[tuple[int, int]]] = {}  # holders -> heap of (bytes so far, holder)
    return tuple(_assign(tensor, loads) for tensor in tensors)


def _assign(tensor: LogicalTensor, loads: dict[int, list[tuple[int, int]]]) -> LogicalTensor:
    parts = []
    for part in tensor.parts:
        layout = part.layout
        if isinstance(layout, Grid) and layout.writer == ANY:
            holders = math.prod(n for d, n in zip(layout.dims, layout.mesh.shape, strict=True) if d == REPLICATED)
            sizes = part.sizes or tensor.shape
            size_bytes = math.prod(sizes) * ITEM_BYTES[tensor.dtype]
            if size_bytes >= CUT_BYTES and layout.dims == (REPLICATED,) and sizes[0] >= holders > 1:
                layout = Grid(layout.mesh, (0,), 0)
            else:
                layout = replace(layout, writer=_writer(size_bytes, holders, loads))
        parts.append(replace(part, layout=layout))
    return replace(tensor, parts=tuple(parts))


def _writer(size_bytes: int, holders: int, loads: dict[int, list[tuple[int, int]]]) -> int:
    if holders == 1 or size_bytes < SMALL_BYTES:
        return 0
    heap = loads.setdefault(holders, [(0, holder) for holder in range(holders)])
    load, holder = heap[0]
    heapq.heapreplace(heap, (load + size_bytes, holder))
    return holder
