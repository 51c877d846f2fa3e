"""Adapter for a module and a torch optimizer: one process, DDP, FSDP2 (any DTensor placement of Shard and Replicate)."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine.errors import UsageError
from engine.format.layout import REPLICATED, Grid, Mesh, mesh_of
from engine.state.names import Names, unwrap
from engine.state.optimizers import Part
from engine.state.source import Piece, Slot


def layout_of(tensor: torch.Tensor) -> Grid:
    """The layout rule of a DTensor, or of a plain tensor that every rank holds whole.

    Raises :class:`UsageError` for placements that are not a cut into contiguous pieces (Partial).
    """
    if not isinstance(tensor, DTensor):
        return replicated()
    mesh = _with_parallel_slices(tensor.device_mesh)
    extra = mesh.ndim - tensor.device_mesh.ndim
    dims, factors = [REPLICATED] * extra, [1] * extra
    for placement in tensor.placements:
        kind = type(placement).__name__
        if not (isinstance(placement, Replicate | Shard) or kind == "_StridedShard"):
            raise UsageError(f"a DTensor placed as {tensor.placements} cannot be saved; Shard and Replicate are known")
        dims.append(REPLICATED if isinstance(placement, Replicate) else placement.dim % max(tensor.ndim, 1))  # type: ignore[union-attr]
        factors.append(getattr(placement, "split_factor", 1))
    order = _cutting_order(dims, factors, tuple(mesh.shape), tensor.placements)
    mesh = mesh.permute(order)
    return Grid(mesh_of(tuple(mesh.shape), tuple(mesh.flatten().tolist())), tuple(dims[i] for i in order))


@lru_cache(maxsize=64)
def _with_parallel_slices(mesh: DeviceMesh) -> torch.Tensor:
    """The ranks of a mesh; where it is a slice of a larger one, those of all its parallel slices, along a first dimension. FSDP2 over
    tensor parallelism cuts what is not parallel on each rank's own slice: all ranks must describe that alike.

    Raises :class:`UsageError` for a mesh whose slices do not tile the larger one.
    """
    ranks = mesh._get_root_mesh().mesh.flatten().tolist()
    own = [ranks.index(rank) for rank in mesh.mesh.flatten().tolist()]
    free, slices = set(range(len(ranks))), []
    while free:
        first = min(free)
        positions = [first + position - own[0] for position in own]
        if not free.issuperset(positions):
            raise UsageError(f"a DTensor on {mesh} cannot be saved: its ranks are no regular slice of those of the mesh it was made from")
        free.difference_update(positions)
        slices.append(torch.tensor([ranks[position] for position in positions], device="cpu").view(mesh.mesh.shape))
    return slices[0] if len(slices) == 1 else torch.stack(slices)


def _cutting_order(dims: list[int], factors: list[int], shape: tuple[int, ...], placements: Any) -> list[int]:
    """Mesh dimensions in the order they cut. A strided shard (FSDP2 over tensor parallelism on one dimension) cuts last: its
    ``split_factor`` says into how many pieces those of later mesh dimensions have cut before it."""
    order = sorted(range(len(dims)), key=lambda i: factors[i] > 1)
    for i in (i for i in order if factors[i] > 1):
        before = math.prod(shape[j] for j in range(len(dims)) if dims[j] == dims[i] and j > i)
        if before != factors[i]:
            raise UsageError(f"a DTensor placed as {placements} on a mesh of shape {shape} cannot be saved: its strided shard is not the last to cut")
    return order


def replicated() -> Grid:
    return Grid(Mesh((world_size(),)), (REPLICATED,))


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of this rank: a view, never a copy."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


class PlainAdapter:
    """``module`` may be wrapped in DDP or torch.compile; without ``parts`` it has no optimizer (weights only, a frozen teacher)."""

    def __init__(self, module: nn.Module, parts: Sequence[Part] = (), schedulers: Sequence[Any] = ()) -> None:
        self.module = unwrap(module)
        self._sharded = [inner for inner in self.module.modules() if isinstance(inner, FSDPModule)]
        self.reshard()
        self.names = Names(self.module)
        self.parts, self.schedulers = list(parts), list(schedulers)
        sharded = any(isinstance(p, DTensor) for p in self.names.parameters.values())
        self.engine = "fsdp2" if sharded else "ddp" if world_size() > 1 else "single"

    def slots(self) -> list[Slot]:
        whole, of = replicated(), self.names.of
        return [
            Slot(_piece(of(p), p, whole), p, i, None, number)
            for number, part in enumerate(self.parts)
            for i, group in enumerate(part.optimizer.param_groups)
            for p in group["params"]
        ]

    def others(self) -> list[Piece]:
        optimized = {id(p) for part in self.parts for group in part.optimizer.param_groups for p in group["params"]}
        whole = replicated()
        return [_piece(name, p, whole) for name, p in self.names.parameters.items() if id(p) not in optimized]

    def anchors(self) -> list[torch.Tensor]:
        return []  # the parameters themselves

    def pending(self) -> str:
        return ""  # a loop's own accumulation is not to be seen from here

    def counters(self) -> dict[str, Any]:
        return {}

    def set_counters(self, counters: dict[str, Any]) -> None:
        """A torch optimizer has none."""

    def publish(self) -> None:
        """Parameters are their own masters; gathered copies of FSDP2's are dropped, and gradients of the replaced weights."""
        self.reshard()
        for part in self.parts:
            part.optimizer.zero_grad()

    def reshard(self) -> None:
        """After a forward without gradient FSDP2 leaves the root gathered: its parameters are then not the sharded ones."""
        for module in self._sharded:
            module.reshard()


def _piece(name: str, parameter: nn.Parameter, whole: Grid) -> Piece:
    if isinstance(parameter, DTensor):
        return Piece(name, tuple(parameter.shape), layout_of(parameter), local_of(parameter))
    return Piece(name, tuple(parameter.shape), whole, parameter.detach())
