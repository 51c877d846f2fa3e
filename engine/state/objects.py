"""Members that are no models: anything with ``state_dict`` and ``load_state_dict``, such as a sampler, a grad scaler, an EMA.

Tensors in such a state become logical tensors of their own, saved and loaded like a model's; the rest goes into the typed record.
All ranks must have the same state, but for those in :class:`PerRank`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.layout import LogicalTensor, Part
from engine.format.record import Array, Reference
from engine.state.plain import layout_of, local_of
from engine.state.shard import Shard, dtype_name, torch_dtype

MAX_ARRAY_BYTES = 1 << 24


class PerRank:
    """A member of which each rank has a state of its own: ``Checkpointer(run, loader=PerRank(loader))``.

    It is restored rank by rank, so only at the world size it was saved at; elsewhere a resume says so, unless ``allow_missing`` names
    the member, which then starts anew. torchdata's ``StatefulDataLoader`` is taken for one without being told.
    """

    def __init__(self, target: Any) -> None:
        self.target = target


class ObjectMember:
    """One such member. ``per_rank``: see :class:`PerRank`."""

    def __init__(self, name: str, member: Any) -> None:
        self.name = name
        self.target = member.target if isinstance(member, PerRank) else member
        self.per_rank = isinstance(member, PerRank) or any(kind.__name__ == "StatefulDataLoader" for kind in type(member).__mro__)

    def capture(self) -> tuple[Any, list[Shard]]:
        """Its state as plain values, and its tensors (none for a per-rank member, which holds them as arrays)."""
        shards: dict[str, Shard] = {}

        def take(path: str, tensor: torch.Tensor) -> Any:
            if self.per_rank:
                return _array(path, "torch", tensor.detach().cpu())
            if path in shards:
                raise UsageError(f"two tensors of member '{self.name}' are both called {path}")
            shards[path] = Shard(LogicalTensor(path, dtype_name(tensor.dtype), tuple(tensor.shape), (Part(layout_of(tensor)),)), (local_of(tensor),))
            return Reference(path)

        plain = _walk(self.target.state_dict(), self.name, take, torch.Tensor)
        plain = _walk(plain, self.name, lambda path, array: _array(path, "numpy", array), np.ndarray)
        if self.per_rank and hasattr(self.target, "num_workers"):
            plain = {"num_workers": self.target.num_workers, "state": plain}
        return plain, list(shards.values())

    def check(self, plain: Any) -> None:
        """Before anything changes. Raises :class:`IncompatibleCheckpoint` where the state cannot be taken over."""
        if self.per_rank and hasattr(self.target, "num_workers"):
            saved = plain.get("num_workers") if isinstance(plain, dict) else None
            if saved != self.target.num_workers:
                raise IncompatibleCheckpoint(
                    f"member '{self.name}' has num_workers={self.target.num_workers} here, {saved} in the checkpoint; its position is kept "
                    f"worker by worker, so give it {saved} workers, or use an ElasticSampler, which has no such limit"
                )
            return
        if hasattr(self.target, "check_state_dict"):
            self.target.check_state_dict(plain)

    def targets(self, plain: Any, stored: dict[str, LogicalTensor]) -> dict[str, tuple[torch.Tensor, Shard]]:
        """New tensors for those the stored state refers to, placed as the live state's are; with the shards to fill."""
        if not references(plain):
            return {}  # asking for the live state may have effects: torchdata's loader begins an epoch
        live: dict[str, torch.Tensor] = {}
        _walk(self.target.state_dict(), self.name, live.setdefault, torch.Tensor)
        found: dict[str, tuple[torch.Tensor, Shard]] = {}

        def make(path: str, reference: Reference) -> Any:
            tensor = stored.get(reference.name)
            if tensor is None:
                raise IncompatibleCheckpoint(f"member '{self.name}': its state refers to the tensor {reference.name}, which the checkpoint lacks")
            new = _empty_like(live.get(path), tensor)
            described = LogicalTensor(tensor.name, tensor.dtype, tensor.shape, (Part(layout_of(new)),))
            found[reference.name] = (new, Shard(described, (local_of(new),)))
            return reference

        _walk(plain, self.name, make, Reference)
        return found

    def restore(self, plain: Any, tensors: dict[str, tuple[torch.Tensor, Shard]]) -> None:
        state = _walk(plain, self.name, lambda path, reference: tensors[reference.name][0], Reference)
        state = _walk(state, self.name, lambda path, array: _from_array(array), Array)
        if self.per_rank and hasattr(self.target, "num_workers"):
            if state["num_workers"] and state["state"].get("_iterator_finished"):
                return  # torchdata would draw the whole next epoch into an iterator and discard it
            state = state["state"]
        self.target.load_state_dict(state)


def references(plain: Any) -> list[str]:
    """The names of the tensors that a stored state refers to."""
    found: list[str] = []
    _walk(plain, "", lambda _, reference: found.append(reference.name), Reference)
    return found


def _walk(value: Any, path: str, change: Callable[[str, Any], Any], kind: type) -> Any:
    """A copy of nested dicts, lists and tuples with every value of ``kind`` replaced."""
    if isinstance(value, kind):
        return change(path, value)
    if isinstance(value, dict):
        return {key: _walk(inner, f"{path}.{key}", change, kind) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        walked = [_walk(inner, f"{path}.{i}", change, kind) for i, inner in enumerate(value)]
        return walked if isinstance(value, list) else tuple(walked)
    return value


def _empty_like(live: torch.Tensor | None, stored: LogicalTensor) -> torch.Tensor:
    dtype = torch_dtype(stored.dtype)
    if isinstance(live, DTensor) and tuple(live.shape) == stored.shape:
        return torch.zeros_like(live, dtype=dtype)
    return torch.zeros(stored.shape, dtype=dtype, device=live.device if live is not None else "cpu")


def _array(path: str, kind: str, value: Any) -> Array:
    tensor = torch.from_numpy(np.ascontiguousarray(value)) if kind == "numpy" else value
    if tensor.numel() * tensor.element_size() > MAX_ARRAY_BYTES:
        raise UsageError(f"{path} has more than the {MAX_ARRAY_BYTES} bytes that an array in a record may have; keep it as a tensor")
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return Array(kind, dtype_name(tensor.dtype), tuple(value.shape), data)


def _from_array(array: Array) -> Any:
    flat = torch.frombuffer(bytearray(array.data), dtype=torch_dtype(array.dtype)) if array.data else torch.empty(0, dtype=torch_dtype(array.dtype))
    tensor = flat.reshape(array.shape)
    return tensor.numpy() if array.kind == "numpy" else tensor
