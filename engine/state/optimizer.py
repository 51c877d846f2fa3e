"""Optimizer state and hyper-parameters by FQN, whatever tensors and scalars the optimizer keeps."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from engine.errors import IncompatibleCheckpoint, LayoutError
from engine.format.layout import Grid, LogicalTensor, Part
from engine.state.plain import layout_of, local_of, replicated
from engine.state.shard import Shard, dtype_name, torch_dtype
from engine.state.source import Slot

# How a step is computed, not what it computes: these follow the resuming run, not the checkpoint.
_IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}
_ADAM = {"Adam", "FusedAdam", "DeepSpeedCPUAdam", "AdamW", "CPUAdam"}


def family(optimizer: torch.optim.Optimizer) -> str:
    """The algorithm, whoever implements it: DeepSpeed's and torch's AdamW keep the same state."""
    name = type(optimizer).__name__
    if name in _ADAM and (name == "AdamW" or getattr(optimizer, "adam_w_mode", False)):
        return "AdamW"
    return "Adam" if name in _ADAM else name


def keeps_python_steps(optimizer: torch.optim.Optimizer) -> bool:
    """DeepSpeed's own Adams count steps in ints, torch's in 0-d tensors."""
    return type(optimizer).__name__ in ("FusedAdam", "DeepSpeedCPUAdam")


def tensor_shard(name: str, shape: tuple[int, ...], layout: Any, local: torch.Tensor) -> Shard:
    return Shard(LogicalTensor(name, dtype_name(local.dtype), shape, (Part(layout),)), (local,))


def state_shards(prefix: str, optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> list[Shard]:
    """A shard for each state tensor of each parameter, named ``<prefix><fqn>.<key>`` as torch flattens them."""
    shards = []
    for slot in slots:
        for key, value in optimizer.state.get(slot.holder, {}).items():
            name = f"{prefix}{slot.piece.name}.{key}"
            if isinstance(value, torch.Tensor):
                shards.append(tensor_shard(name, (), replicated(), local_of(value)) if value.ndim == 0 else _elementwise(name, slot, value))
            elif key == "step" and type(value) is int:  # stored as torch's own Adam would, so that either can load it
                shards.append(tensor_shard(name, (), replicated(), torch.tensor(float(value))))
    return shards


def _elementwise(name: str, slot: Slot, value: torch.Tensor) -> Shard:
    piece = slot.piece
    if slot.cut is None:
        same = value.shape == slot.holder.shape
        return tensor_shard(
            name, tuple(value.shape), piece.layout if same and type(value) is type(slot.holder) else layout_of(value), local_of(value)
        )
    if value.numel() != slot.holder.numel():
        raise LayoutError(
            f"{name}: a state of {tuple(value.shape)} for a flat buffer of {slot.holder.numel()} elements cannot be told apart by parameter"
        )
    local = local_of(value).view(-1).narrow(0, *slot.cut)
    return tensor_shard(name, piece.shape, piece.layout, local.view(piece.shape) if isinstance(piece.layout, Grid) else local)


def python_scalars(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> dict[str, dict[str, Any]]:
    found = {}
    for slot in slots:
        state = optimizer.state.get(slot.holder, {})
        scalars = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor) and not (k == "step" and type(v) is int)}
        if scalars:
            found[slot.piece.name] = scalars
    return found


def hyper_parameters(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> list[dict[str, Any]]:
    """Per group: its values and the FQNs they hold for."""
    names: dict[int, list[str]] = {}
    for slot in slots:
        names.setdefault(slot.group, []).append(slot.piece.name)
    return [
        {"params": names.get(i, []), "values": {k: v for k, v in group.items() if k not in _IMPLEMENTATION}}
        for i, group in enumerate(optimizer.param_groups)
    ]


def restore_hyper_parameters(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], stored: list[dict[str, Any]], resolve: dict[str, str]) -> None:
    """Raises :class:`IncompatibleCheckpoint` where one live group would need two values."""
    by_name = {name: group["values"] for group in stored for name in group["params"]}
    chosen: dict[int, tuple[str, dict[str, Any]]] = {}
    for slot in slots:
        values = by_name.get(resolve.get(slot.piece.name, slot.piece.name))
        if values is None:
            continue
        name, first = chosen.setdefault(slot.group, (slot.piece.name, values))
        differing = [k for k in first if values.get(k) != first[k]] if values is not first else []
        if differing:
            raise IncompatibleCheckpoint(
                f"param group {slot.group} holds {name} and {slot.piece.name}, saved with different {differing[0]} "
                f"({first[differing[0]]!r} and {values.get(differing[0])!r}); put them in separate groups"
            )
    for number, (_, values) in chosen.items():
        group = optimizer.param_groups[number]
        for key, value in values.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            elif key in group:
                group[key] = value


def by_holder(slots: Iterable[Slot]) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.holder), []).append(slot)
    for shared in groups.values():
        yield shared[0].holder, shared


def scalar_targets(prefix: str, slots: Iterable[Slot], stored: dict[str, dict[str, LogicalTensor]]) -> list[Shard]:
    return [
        tensor_shard(f"{prefix}{slot.piece.name}.{key}", (), replicated(), torch.zeros((), dtype=torch_dtype(tensor.dtype)))
        for slot in slots
        for key, tensor in stored.get(slot.piece.name, {}).items()
        if not tensor.shape
    ]


def check_holders(slots: Iterable[Slot], scalars: dict[str, dict[str, Any]], stored: dict[str, dict[str, LogicalTensor]]) -> None:
    """One flat buffer has one set of scalars and states: raises :class:`IncompatibleCheckpoint` where the checkpoint has more."""
    for _, shared in by_holder(slots):
        if len(shared) == 1:
            continue
        kinds: dict[Any, list[str]] = {}
        for slot in shared:
            name = slot.piece.name
            kinds.setdefault((tuple(sorted(stored.get(name, {}))), tuple(sorted(scalars.get(name, {}).items()))), []).append(name)
        if len(kinds) > 1:
            (a, a_names), (b, b_names) = list(kinds.items())[:2]
            raise IncompatibleCheckpoint(
                f"ZeRO keeps one step count and one set of moments for all parameters of a flat buffer, but in this checkpoint {a_names[0]} "
                f"(and {len(a_names) - 1} more) has {_describe(a)} and {b_names[0]} (and {len(b_names) - 1} more) has {_describe(b)}. "
                "Put them in different param groups, or resume under DDP, FSDP2 or ZeRO stage 0"
            )


def _describe(kind: Any) -> str:
    states, scalars = kind
    return f"{dict(scalars)}" if states else "no optimizer state"


def describe(
    prefix: str, optimizer: torch.optim.Optimizer, slots: Iterable[Slot], stored: dict[str, dict[str, LogicalTensor]]
) -> list[LogicalTensor]:
    """The state tensors as :func:`allocate` will leave them, to be compared with the checkpoint's before anything changes."""
    described = []
    for slot in slots:
        state = optimizer.state.get(slot.holder, {})
        for key, tensor in stored.get(slot.piece.name, {}).items():
            if not tensor.shape:
                continue
            live = state.get(key)
            alike = tensor.shape == slot.piece.shape or slot.cut is not None
            shape = slot.piece.shape if alike else tuple(live.shape) if isinstance(live, torch.Tensor) else tensor.shape
            dtype = live.dtype if isinstance(live, torch.Tensor) else _state_dtype(slot, tensor)
            described.append(LogicalTensor(f"{prefix}{slot.piece.name}.{key}", dtype_name(dtype), shape, ()))
    return described


def allocate(
    optimizer: torch.optim.Optimizer, slots: Iterable[Slot], stored: dict[str, dict[str, LogicalTensor]], scalars: dict[str, dict[str, Any]]
) -> None:
    """Give each holder exactly the states that the checkpoint has for it: new ones zeroed, others dropped."""
    for holder, shared in by_holder(slots):
        name = shared[0].piece.name
        wanted, numbers = stored.get(name, {}), scalars.get(name, {})
        if not wanted and not numbers:
            optimizer.state.pop(holder, None)
            continue
        state = optimizer.state[holder]
        for key in [k for k in state if k not in wanted and k not in numbers]:
            del state[key]
        for key, tensor in wanted.items():
            if key not in state:
                state[key] = _zeros(optimizer, shared[0], key, tensor)


def _zeros(optimizer: torch.optim.Optimizer, slot: Slot, key: str, tensor: LogicalTensor) -> Any:
    dtype = _state_dtype(slot, tensor)
    if not tensor.shape:
        if key == "step" and keeps_python_steps(optimizer):
            return 0
        group = optimizer.param_groups[slot.group]
        on_device = group.get("capturable") or group.get("fused")  # where torch's Adam keeps its step then
        return torch.zeros((), dtype=dtype, device=slot.holder.device if on_device else "cpu")
    if slot.cut is not None or tensor.shape == slot.piece.shape:
        return torch.zeros_like(slot.holder.detach(), dtype=dtype)
    return torch.zeros(tensor.shape, dtype=dtype, device=slot.holder.device)


def _state_dtype(slot: Slot, tensor: LogicalTensor) -> torch.dtype:
    """Optimizers make their moments in the parameter's dtype; scalars and integer states keep their own."""
    dtype = torch_dtype(tensor.dtype)
    both_float = dtype.is_floating_point and slot.holder.dtype.is_floating_point
    return slot.holder.dtype if tensor.shape and both_float else dtype


def apply_scalars(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], scalars: dict[str, dict[str, Any]]) -> None:
    for holder, shared in by_holder(slots):
        for key, value in scalars.get(shared[0].piece.name, {}).items():
            live = optimizer.state[holder].get(key)
            if isinstance(live, torch.Tensor):
                local_of(live).fill_(value)
            else:
                optimizer.state[holder][key] = int(value) if key == "step" else value
