"""Parameters that are boxes of a larger logical tensor: the rows of a partly frozen weight, the experts of one layer.

A module declares rows by an attribute ``row_parts``, a mapping from the name that the whole weight would have to the names of the
parameters that are its rows, in order: ``row_parts = {"weight": ("frozen", "trainable")}``. DeepSpeed's experts are known by their
marks: all experts of a layer are one logical tensor ``[experts, …]`` by global expert id.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from msgspec import Struct
from msgspec.structs import replace
from torch import nn

from engine.errors import LayoutError
from engine.format.layout import REPLICATED, Absent, Grid, Layout, LogicalTensor, Mesh, Part, mesh_of
from engine.state.shard import Shard, dtype_name

ROW_PARTS = "row_parts"
_LOCAL_EXPERTS = "deepspeed_experts"


class Place(Struct, frozen=True, gc=False):
    """A parameter is the box at ``offsets`` of ``sizes`` of the logical tensor ``name``. For experts, ``mesh`` are the ranks that hold
    it, and ``twins`` say where the same parameter of other expert-parallel ranks lies, and which ranks hold that."""

    name: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    mesh: Mesh | None = None
    twins: tuple[tuple[tuple[int, ...], Mesh], ...] = ()


class Held(Struct, frozen=True, gc=False):
    """A part of a logical tensor: its box, its layout within it, and the live values; None where other ranks hold them, or nobody."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    layout: Layout
    local: torch.Tensor | None


def full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def row_places(module: nn.Module, prefix: str, found: Mapping[str, nn.Parameter]) -> dict[str, Place]:
    """Places of the parameters of ``module`` that it declares as rows; ``found``: its parameters by own name."""
    places = {}
    declared = vars(module).get(ROW_PARTS) or getattr(type(module), ROW_PARTS, {})  # wrappers forward attributes: not theirs
    for whole, names in declared.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise LayoutError(f"{prefix or 'the module'} declares {missing[0]} as rows of {whole}, but has no such parameter")
        shapes = [full_shape(found[name]) for name in names]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise LayoutError(f"{prefix}{whole}: parameters of shapes {shapes} cannot be rows of one tensor")
        total, row = sum(shape[0] for shape in shapes), 0
        for name, shape in zip(names, shapes, strict=True):
            inner = (0,) * (len(shape) - 1)
            places[name] = Place(f"{prefix}{whole}", (total, *shape[1:]), (row, *inner), shape)
            row += shape[0]
    return places


def local_experts(module: nn.Module) -> dict[int, int]:
    """By a parameter's id, how many experts its layer has on this rank."""
    lists = [inner for name, inner in module.named_modules() if name.endswith(_LOCAL_EXPERTS) and isinstance(inner, nn.ModuleList)]
    return {id(parameter): len(experts) for experts in lists for parameter in experts.parameters()}


def expert_place(name: str, parameter: Any, count: int) -> Place:
    """The place of one of DeepSpeed's experts, of which a rank has ``count``. The expert-parallel groups must exist."""
    from deepspeed.utils import groups

    components = name.split(".")
    at = components.index(_LOCAL_EXPERTS) + 1
    local, stacked = int(components[at]), ".".join(components[:at] + components[at + 1 :])
    group, shape = parameter.group_name, full_shape(parameter)
    ep, dp = groups._get_expert_parallel_group_ranks(group), groups._get_expert_data_parallel_group_ranks(group)
    here, inner = groups._get_expert_parallel_rank(group), (0,) * len(shape)
    twins = tuple(
        ((position * count + local, *inner), mesh_of((len(dp),), tuple(rank + other - ep[here] for rank in dp)))
        for position, other in enumerate(ep)
        if position != here
    )
    mesh = mesh_of((len(dp),), tuple(dp))
    return Place(stacked, (len(ep) * count, *shape), (here * count + local, *inner), (1, *shape), mesh, twins)


def held(place: Place, shape: tuple[int, ...], layout: Layout, local: torch.Tensor | None) -> list[Held]:
    """A parameter of ``shape`` with its ``layout`` and live values, as parts of its logical tensor: its own and its twins'."""
    extra = len(place.sizes) - len(shape)
    if place.mesh is not None and isinstance(layout, Grid):
        layout = Grid(place.mesh, (REPLICATED,))  # to an adapter a whole parameter is on every rank
    if isinstance(layout, Grid):
        layout = replace(layout, dims=tuple(dim if dim == REPLICATED else dim + extra for dim in layout.dims))
        local = local.unsqueeze(0) if extra and local is not None else local
    own = Held(place.offsets, place.sizes, layout, local)
    if isinstance(layout, Absent):
        return [own, *(Held(offsets, place.sizes, layout, None) for offsets, _ in place.twins)]
    return [own, *(Held(offsets, place.sizes, replace(layout, mesh=mesh), None) for offsets, mesh in place.twins)]


def join(name: str, shape: tuple[int, ...], parts: list[Held]) -> Shard:
    """One shard of all parts. Values of smaller dtypes are stored widened to the largest."""
    parts = sorted((part for part in parts if 0 not in part.sizes or 0 in shape), key=lambda part: part.offsets)
    own = [None if part.local is None else part.local.dtype for part in parts]
    widest = reduce(torch.promote_types, [dtype for dtype in own if dtype is not None])
    described = [
        Part(part.layout, part.offsets, part.sizes, "" if dtype in (None, widest) else dtype_name(dtype))
        for part, dtype in zip(parts, own, strict=True)
    ]
    return Shard(LogicalTensor(name, dtype_name(widest), shape, tuple(described)), tuple(part.local for part in parts))
