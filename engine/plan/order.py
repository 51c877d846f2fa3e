"""The order of tensors in a manifest: those that are cut alike lie together.

A rank that loads under another sharding needs, of each writer, the tensors of a few geometries. With these side by side it finds
them in few pages of that writer's index.
"""

from collections.abc import Sequence
from typing import Any

from engine.format.layout import REPLICATED, Absent, Grid, LogicalTensor
from engine.plan.assign import is_frozen


def reading_order(tensors: Sequence[LogicalTensor], world_size: int | None = None) -> tuple[list[int], list[int]]:
    """The places of ``tensors`` in the order that a manifest lists them, and the geometry class of each listed one. Frozen ones, with
    writers from ``world_size`` on, come first, by name: their indexes are kept from save to save, whatever else there is."""
    known: dict[tuple[object, ...], tuple[Any, ...]] = {}  # most tensors share a few shapes and layouts
    keys = []
    for tensor in tensors:
        if world_size is not None and is_frozen(tensor, world_size):
            keys.append(("", tensor.name))
            continue
        kind = (tensor.shape, tensor.parts)
        key = known.get(kind)
        if key is None:
            key = known[kind] = _geometry(tensor)
        keys.append(key)
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    order = sorted(range(len(tensors)), key=[ranks[key] for key in keys].__getitem__)  # stable
    numbers: dict[Any, int] = {}
    classes_of = {key: numbers.setdefault(key[:-1], len(numbers)) for key in ranks}
    return order, [classes_of[keys[i]] for i in order]


def _geometry(tensor: LogicalTensor) -> tuple[Any, ...]:
    """Comparable; alike but for the last element where the same ranks hold the same share of both."""
    part = next((part for part in tensor.parts if not isinstance(part.layout, Absent)), None)
    if part is None:
        return ("absent", (), 0, (), 0, (), 0)
    layout, sizes = part.layout, part.sizes or tensor.shape
    if isinstance(layout, Grid):
        cut = tuple(sizes[dim] for dim in layout.dims if dim != REPLICATED)
        return ("grid", layout.mesh.shape, layout.mesh.first, (layout.dims, cut), max(layout.writer, 0), sizes, 0)
    assert not isinstance(layout, Absent)
    return ("flat", layout.mesh.shape, layout.mesh.first, ((), ()), layout.chunk, (), layout.start)
