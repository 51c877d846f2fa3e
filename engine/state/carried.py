"""State that is not laid out by parameter: plain values for the record, and tensors of their own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, zeros

from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.layout import REPLICATED, Grid, LogicalTensor, Part, mesh_of
from engine.format.record import Reference, Typed
from engine.state.plain import layout_of, local_of
from engine.state.shard import Shard, dtype_name, new_tensor, torch_dtype
from engine.state.values import SMALL_BYTES, Unknown, flatten, placements, references, small_array

LoadedTensors = dict[str, tuple[torch.Tensor, Shard]]
"""New tensors by stored name, each with the shard that a load fills."""


class Carried:
    """A state taken apart: :meth:`flatten` returns its record, and collects the tensors of it in ``shards``.

    Tensors are named ``base`` and their path. Up to ``small_bytes`` they stand in the record. Of a state
    of ``rank``'s own they go by the rank as well. ``check`` is asked for each tensor, and may raise.
    """

    def __init__(
        self,
        base: str,
        check: Callable[[str, torch.Tensor], None] | None = None,
        *,
        small_bytes: int = SMALL_BYTES,
        rank: int | None = None,
    ) -> None:
        self._base = base if rank is None else f"{base}.rank_{rank:05d}"
        self._check, self._small_bytes, self._rank = check, small_bytes, rank
        self.shards: list[Shard] = []
        self._names: set[str] = set()

    def flatten(self, value: Any, path: str, unknown: Unknown) -> Any:
        """Return ``value`` for a record. Raises :class:`UsageError` for two tensors of one path."""
        try:
            return flatten(value, path, self._take, unknown)
        except UsageError as e:  # of a tensor: what else is refused, ``unknown`` has worded
            raise UsageError(f"{self._base}: {e}" if str(e).startswith(".") else str(e)) from e

    def _take(self, path: str, tensor: torch.Tensor) -> Any:
        if self._check is not None:
            self._check(path, tensor)
        if not isinstance(tensor, DTensor) and tensor.nbytes <= self._small_bytes:
            return small_array(tensor)
        name = f"{self._base}{'' if not path or path.startswith('.') else '.'}{path}"
        if name in self._names:
            raise UsageError(f"two tensors are both called {name}; rename a key")
        self._names.add(name)
        if self._rank is None:
            layout = layout_of(tensor)
        elif isinstance(tensor, DTensor):
            raise UsageError(f"{name} is a DTensor in a state of one rank's own; give the object without PerRank")
        else:
            layout = of_rank(self._rank)
        logical = LogicalTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), (Part(layout),))
        self.shards.append(Shard(logical, (local_of(tensor),)))
        return Reference(name) if tensor.device.type == "cpu" else Typed("accelerator", Reference(name))


def of_rank(rank: int) -> Grid:
    """Return the layout of a tensor that one rank holds alone."""
    return Grid(mesh_of((1,), (rank,)), (REPLICATED,))


def targets(
    plain: Any,
    stored: Mapping[str, LogicalTensor],
    owner: str,
    meshes: Sequence[Any],
    live: Mapping[str, torch.Tensor] | None = None,
    rank: int | None = None,
) -> LoadedTensors:
    """Return a new tensor for each that a flattened state refers to.

    A DTensor becomes one again: on the mesh of the ``live`` one of that name, else of ``meshes``.
    Raises :class:`IncompatibleCheckpoint` for a tensor that the checkpoint lacks.
    """
    found: LoadedTensors = {}
    for name, dims in references(plain).items():
        tensor = stored.get(name)
        if tensor is None:
            raise IncompatibleCheckpoint(f"{owner}: its state refers to the tensor {name}, which the checkpoint lacks")
        new = _new(tensor, dims, meshes, (live or {}).get(name))
        layout = layout_of(new) if rank is None else of_rank(rank)
        found[name] = (new, Shard(LogicalTensor(name, tensor.dtype, tensor.shape, (Part(layout),)), (local_of(new),)))
    return found


def _new(stored: LogicalTensor, dims: list[int] | None, meshes: Sequence[Any], live: torch.Tensor | None) -> torch.Tensor:
    """A DTensor where the live state has one, or has none yet and the model is of DTensors; else a whole tensor, as other engines hold."""
    dtype = torch_dtype(stored.dtype)
    if isinstance(live, DTensor) and tuple(live.shape) == stored.shape:
        return torch.zeros_like(live, dtype=dtype)
    is_plain = isinstance(live, torch.Tensor) and not isinstance(live, DTensor)
    if dims is None or is_plain or not (meshes or isinstance(live, DTensor)):
        return new_tensor(stored, dtype, live.device if live is not None and not live.is_meta else torch.device("cpu"))
    mesh = next((mesh for mesh in meshes if mesh.ndim == len(dims)), None)
    if mesh is None:
        mesh, first = meshes[0], next((dim for dim in dims if dim >= 0), -1)
        dims = [first, *(-1 for _ in range(mesh.ndim - 1))]
    return zeros(*stored.shape, dtype=dtype, device_mesh=mesh, placements=placements(dims))


def meshes_of(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """Return the device meshes of those that are DTensors, each once."""
    found: list[Any] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor) and tensor.device_mesh not in found:
            found.append(tensor.device_mesh)
    return found
