"""Optimizer state and hyper-parameters by FQN, whatever tensors and scalars the optimizer keeps.

A state is a *scalar* if it is one number for the whole parameter (``step``), else a tensor: laid out like the parameter, or of
a shape of its own (factored states). Scalars are restored by value, tensors are filled in place.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from msgspec import Struct
from torch.distributed.tensor import DTensor, Replicate, zeros
from torch.distributed.tensor import Shard as Cut

from engine.errors import IncompatibleCheckpoint, LayoutError
from engine.format.layout import REPLICATED, Absent, Grid, LogicalTensor, Part
from engine.state.parts import Held, held, join
from engine.state.plain import layout_of, local_of, replicated
from engine.state.shard import Shard, dtype_name, torch_dtype
from engine.state.source import Piece, Slot

States = dict[str, dict[str, LogicalTensor]]
"""Stored optimizer tensors by live FQN and key."""

Scalars = dict[str, dict[str, Any]]
"""Scalar values by live FQN and key."""

Shapes = dict[str, tuple[int, ...]]
"""The stored shape of each parameter, by live FQN."""

# How a step is computed, not what it computes: these follow the resuming run, not the checkpoint.
_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
# What is told where it differs from the checkpoint's; other values (schedule-free's k, weight_sum) are state that changes each step.
_TOLD = {"lr", "initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "rho", "amsgrad", "maximize"}
# Optimizers of known classes that keep other states for matrices than for vectors, such as a flat buffer.
_BY_SHAPE = {"Adafactor"}
_ADAM = {"Adam", "FusedAdam", "DeepSpeedCPUAdam", "AdamW", "CPUAdam"}


def family(optimizer: torch.optim.Optimizer) -> str:
    """The algorithm, whoever implements it: DeepSpeed's and torch's AdamW keep the same state."""
    name = type(optimizer).__name__
    if name in _ADAM and (name == "AdamW" or getattr(optimizer, "adam_w_mode", False)):
        return "AdamW"
    return "Adam" if name in _ADAM else name


def is_scalar(key: str, shape: tuple[int, ...], piece: Piece) -> bool:
    """A 0-d moment of a 0-d parameter is a tensor like any other."""
    return not shape and (key == "step" or piece.shape != ())


def tensor_shard(name: str, shape: tuple[int, ...], layout: Any, local: torch.Tensor) -> Shard:
    return Shard(LogicalTensor(name, dtype_name(local.dtype), shape, (Part(layout),)), (local,))


def state_shards(prefix: str, optimizer: torch.optim.Optimizer, slots: Iterable[Slot], frozen: Sequence[Piece] = ()) -> list[Shard]:
    """A shard for each state tensor of each parameter, named ``<prefix><fqn>.<key>`` as torch flattens them.

    Of a logical tensor that consists of several parameters the states are joined too; ``frozen`` are those parts without state:
    declared absent.
    """
    shards: dict[str, Shard] = {}
    parts: dict[tuple[str, str], list[Held]] = {}
    wholes = {}
    for slot in slots:
        piece = slot.piece
        for key, value in optimizer.state.get(slot.holder, {}).items():
            name = f"{prefix}{piece.name}.{key}"
            if isinstance(value, torch.Tensor):
                if value.ndim == 0 and is_scalar(key, (), piece):
                    shards[name] = tensor_shard(name, (), replicated(), local_of(value))
                    continue
                shard = _elementwise(name, slot, value)
                if piece.place is None:
                    shards[name] = shard
                    continue
                if shard.tensor.shape != piece.shape:
                    raise LayoutError(f"{name}: a state of {list(shard.tensor.shape)} for a part of a larger weight cannot be joined to one tensor")
                wholes[name] = piece.place.whole
                parts.setdefault((name, piece.name), []).extend(held(piece.place, piece.shape, shard.tensor.parts[0].layout, shard.locals[0]))
            elif _counts_in_ints(key, value):  # stored as torch's own Adam would, so that either can load it
                shards[name] = tensor_shard(name, (), replicated(), torch.tensor(float(value)))
    for (name, fqn), found in parts.items():
        rest = [held(piece.place, piece.shape, Absent(), None) for piece in frozen if piece.name == fqn and piece.place]
        shards[name] = join(name, wholes[name], [*found, *chain.from_iterable(rest)])
    return list(shards.values())


def int_steps(
    optimizer: torch.optim.Optimizer, states: Iterable[Shard], prefix: str, slots: Iterable[Slot]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The holders of states whose step is a Python int, each with the tensor that :func:`state_shards` made of it."""
    made = {shard.name: shard.locals[0] for shard in states if shard.name.endswith(".step") and not shard.tensor.shape}
    pairs = [(slot.holder, made.get(f"{prefix}{slot.piece.name}.step")) for slot in slots]
    return [(holder, tensor) for holder, tensor in pairs if tensor is not None and _counts_in_ints("step", optimizer.state[holder].get("step"))]


def refresh_int_steps(optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for holder, tensor in pairs:
        tensor.fill_(optimizer.state[holder]["step"])


def _counts_in_ints(key: str, value: Any) -> bool:
    return key == "step" and type(value) is int


def _elementwise(name: str, slot: Slot, value: torch.Tensor) -> Shard:
    piece, local = slot.piece, local_of(value)
    if slot.cut is not None:
        if value.numel() != slot.holder.numel():
            raise LayoutError(
                f"{name}: a state of {tuple(value.shape)} for a flat buffer of {slot.holder.numel()} elements cannot be told apart by parameter"
            )
        local = local.view(-1).narrow(0, *slot.cut)
        return tensor_shard(name, piece.shape, piece.layout, local.view(piece.shape) if isinstance(piece.layout, Grid) else local)
    if isinstance(slot.holder, DTensor) and not isinstance(value, DTensor):  # an optimizer that works on local shards
        if local.shape != slot.holder._local_tensor.shape:
            raise LayoutError(
                f"{name}: a plain tensor of {tuple(value.shape)} beside a parameter sharded by FSDP2; it may differ by rank, "
                "so it cannot be saved as one. Keep such states as DTensors"
            )
        return tensor_shard(name, piece.shape, piece.layout, local)
    return tensor_shard(
        name, tuple(value.shape), piece.layout if value.shape == slot.holder.shape and _alike(value, slot) else layout_of(value), local
    )


def _alike(value: torch.Tensor, slot: Slot) -> bool:
    if isinstance(value, DTensor) and isinstance(slot.holder, DTensor):
        return value.placements == slot.holder.placements and value.device_mesh == slot.holder.device_mesh
    return not isinstance(value, DTensor)


def python_scalars(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> Scalars:
    """Numbers that are no tensors, but for the int steps that :func:`state_shards` stores."""
    found = {}
    for slot in slots:
        state = optimizer.state.get(slot.holder, {})
        scalars = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor) and not _counts_in_ints(k, v)}
        if scalars:
            found[slot.piece.name] = scalars
    return found


def counts_in_ints(optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> bool:
    """Whether a new ``step`` is an int: as the same class had it when it saved, else as its makers do."""
    if record.get("optimizer_class") == type(optimizer).__name__:
        return bool(record.get("int_steps"))
    return type(optimizer).__module__.startswith("deepspeed.")


def local_states(optimizer: torch.optim.Optimizer) -> list[str]:
    """The keys of states that are plain tensors, shaped like the local shard, beside DTensor parameters."""
    holders = [(holder, state) for holder, state in optimizer.state.items() if isinstance(holder, DTensor)]
    return sorted({k for _, state in holders for k, v in state.items() if isinstance(v, torch.Tensor) and not isinstance(v, DTensor) and v.ndim})


def has_int_steps(optimizer: torch.optim.Optimizer) -> bool:
    return any(_counts_in_ints(k, v) for state in optimizer.state.values() for k, v in state.items())


class Lasting(Struct, frozen=True):
    """What a record says of an optimizer that stays as it is while no tensor of its state is replaced: ``names`` by group, and whether
    the state ``has_numbers`` that are no tensors."""

    record: dict[str, Any]
    names: dict[int, list[str]]
    has_numbers: bool


def lasting_record(optimizer: torch.optim.Optimizer, slots: Sequence[Slot]) -> Lasting:
    names: dict[int, dict[str, None]] = {}
    for slot in slots:
        names.setdefault(slot.group, {})[slot.piece.name] = None
    record = {
        "optimizer": family(optimizer),
        "optimizer_class": type(optimizer).__name__,
        "int_steps": has_int_steps(optimizer),
        "local_states": local_states(optimizer),
        "flat": is_flat(slots),
        "stateless": list(dict.fromkeys(slot.piece.name for slot in slots if not optimizer.state.get(slot.holder))),
    }
    has_numbers = any(not isinstance(value, torch.Tensor) for state in optimizer.state.values() for value in state.values())
    return Lasting(record, {group: list(found) for group, found in names.items()}, has_numbers)


def hyper_parameters(optimizer: torch.optim.Optimizer, names: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    """Per group: its values and the FQNs they hold for, ``names``."""
    return [
        {"params": names.get(i, []), "values": {k: v for k, v in group.items() if k not in _IMPLEMENTATION}}
        for i, group in enumerate(optimizer.param_groups)
    ]


def choose_hyper_parameters(slots: Iterable[Slot], stored: list[dict[str, Any]], resolve: dict[str, str]) -> dict[int, dict[str, Any]]:
    """The stored values for each live group. Raises :class:`IncompatibleCheckpoint` where one group would need two."""
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
    return {number: values for number, (_, values) in chosen.items()}


def settle_hyper_parameters(
    optimizer: torch.optim.Optimizer, chosen: dict[int, dict[str, Any]], override: Sequence[str]
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The values to apply, where those of this run win that ``override`` names; and every difference, worded.

    A rate under a scheduler (it has an ``initial_lr``) is overridden at its base: the present rate keeps its ratio to it.
    """
    settled, told = {}, []
    for number, stored in chosen.items():
        group, values = optimizer.param_groups[number], dict(stored)
        scheduled = "initial_lr" in group and "initial_lr" in stored
        for key in [k for k in values if k in group and (k in _TOLD or k in override)]:
            if (key == "lr" and scheduled) or _same(group[key], values[key]):
                continue
            name = "lr" if key == "initial_lr" else key
            wins = name in override
            told.append(
                f"param group {number}: {name} is {group[key]!r} here and {values[key]!r} in the checkpoint; "
                + ("this run's is used" if wins else f"the checkpoint's is used (override=({name!r},) takes this run's)")
            )
            if wins and key == "initial_lr":
                values["lr"] = float(group[key]) if not values[key] else float(values["lr"]) * float(group[key]) / float(values[key])
            if wins:
                values[key] = group[key].item() if isinstance(group[key], torch.Tensor) else group[key]
        settled[number] = values
    return settled, told


def _same(a: Any, b: Any) -> bool:
    return (tuple(a) == tuple(b)) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else bool(a == b)


def apply_hyper_parameters(optimizer: torch.optim.Optimizer, chosen: dict[int, dict[str, Any]]) -> None:
    for number, values in chosen.items():
        group = optimizer.param_groups[number]
        for key, value in values.items():
            if key in _IMPLEMENTATION:
                continue
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


def scalar_targets(prefix: str, slots: Iterable[Slot], stored: States) -> list[Shard]:
    """Temporaries for the stored scalars."""
    return [
        tensor_shard(f"{prefix}{name}.{key}", (), replicated(), torch.zeros((), dtype=torch_dtype(tensor.dtype)))
        for name, slot in {slot.piece.name: slot for slot in slots}.items()
        for key, tensor in stored.get(name, {}).items()
        if is_scalar(key, tensor.shape, slot.piece)
    ]


def check_holders(slots: Iterable[Slot], scalars: Scalars, stored: States, kept: set[str]) -> None:
    """One flat buffer has one set of scalars and states: raises :class:`IncompatibleCheckpoint` where the checkpoint has more."""
    for _, shared in by_holder(slots):
        if len(shared) == 1:
            continue
        kinds: dict[Any, list[str]] = {}
        for slot in shared:
            name = slot.piece.name
            kind = (name in kept, tuple(sorted(stored.get(name, {}))), tuple(sorted(scalars.get(name, {}).items())))
            kinds.setdefault(kind, []).append(name)
        if len(kinds) > 1:
            (a, a_names), (b, b_names) = list(kinds.items())[:2]
            raise IncompatibleCheckpoint(
                f"ZeRO keeps one step count and one set of moments for all parameters of a flat buffer, but in this checkpoint {a_names[0]} "
                f"(and {len(a_names) - 1} more) has {_told(a)} and {b_names[0]} (and {len(b_names) - 1} more) has {_told(b)}. "
                "Put them in different param groups, or resume under DDP, FSDP2 or ZeRO stage 0"
            )


def is_flat(slots: Iterable[Slot]) -> bool:
    """Whether the optimizer sees flat buffers, not parameters."""
    return any(slot.cut is not None for slot in slots)


def check_kinds(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], stored: States, kept: set[str], record: dict[str, Any]) -> bool:
    """Raises :class:`IncompatibleCheckpoint` where the optimizer is seen to keep other tensors than the checkpoint has: factored
    states, say, of parameters that lay in a flat buffer when they were saved. Returns whether nothing shows it before a step."""
    slots, unseen = list(slots), False
    flat = is_flat(slots)
    crossed = record.get("flat", False) != flat
    if crossed and type(optimizer).__name__ in _BY_SHAPE:
        raise IncompatibleCheckpoint(
            f"{type(optimizer).__name__} keeps other states in ZeRO's flat buffers than for parameters of their own shape. "
            "Resume under an engine of the kind that saved"
        )
    for slot in slots:
        name, state = slot.piece.name, optimizer.state.get(slot.holder, {})
        wanted = {key for key, tensor in stored.get(name, {}).items() if not is_scalar(key, tensor.shape, slot.piece)}
        live = {key for key, value in state.items() if isinstance(value, torch.Tensor) and not is_scalar(key, tuple(value.shape), slot.piece)}
        unseen = unseen or bool(crossed and not flat and wanted and not live)
        if name not in kept and live - wanted and wanted - live:
            raise IncompatibleCheckpoint(
                f"{type(optimizer).__name__} keeps {sorted(live)} for {name} here, but the checkpoint has {sorted(wanted)}: "
                "its states depend on how parameters are laid out. Resume under an engine of the kind that saved"
            )
    return unseen


def watch_first_step(optimizer: torch.optim.Optimizer) -> None:
    """The next step must find all states that it keeps; what it would make anew was not restored. It raises
    :class:`IncompatibleCheckpoint` then."""
    restored = {holder: set(state) for holder, state in optimizer.state.items()}

    def check(*_: Any) -> None:
        handle.remove()
        for holder, keys in restored.items():
            new = sorted(key for key, value in optimizer.state[holder].items() if key not in keys and isinstance(value, torch.Tensor) and value.ndim)
            if new:
                raise IncompatibleCheckpoint(
                    f"{type(optimizer).__name__} has made {new} anew for a parameter of shape {tuple(holder.shape)}, of which the checkpoint had "
                    f"{sorted(keys)}: its states depend on how parameters are laid out. Resume under an engine of the kind that saved"
                )

    handle = optimizer.register_step_post_hook(check)


def _told(kind: Any) -> str:
    kept, states, scalars = kind
    if kept:
        return "no place in the optimizer"
    return f"{dict(scalars)}" if states else "no optimizer state"


def describe(
    prefix: str, optimizer: torch.optim.Optimizer, slots: Iterable[Slot], stored: States, same_dtype: set[str], shapes: Shapes
) -> list[LogicalTensor]:
    """The state tensors as :func:`allocate` will leave them, to be compared with the checkpoint's before anything changes."""
    described = {}
    for slot in slots:
        piece, state = slot.piece, optimizer.state.get(slot.holder, {})
        for key, tensor in stored.get(piece.name, {}).items():
            if is_scalar(key, tensor.shape, piece):
                continue
            live = state.get(key)
            alike = is_elementwise(slot, tensor, shapes)
            shape = piece.whole if alike else tuple(live.shape) if isinstance(live, torch.Tensor) else tensor.shape
            if slot.cut is not None and tensor.shape != shapes.get(piece.name, piece.whole):
                raise IncompatibleCheckpoint(
                    f"{tensor.name} has shape {list(tensor.shape)}, its parameter {list(shapes.get(piece.name, piece.whole))}: a flat buffer of ZeRO "
                    "cannot hold states that are not one value an element. Resume under DDP, FSDP2 or ZeRO stage 0"
                )
            if not alike and any(isinstance(part.layout, Absent) for part in tensor.parts):  # would be allocated at a size nothing backs
                raise IncompatibleCheckpoint(f"{tensor.name} of shape {list(tensor.shape)} is declared absent in part, and unlike its parameter")
            dtype = live.dtype if isinstance(live, torch.Tensor) else _moment_dtype(slot, tensor, same_dtype)
            described[piece.name, key] = LogicalTensor(f"{prefix}{piece.name}.{key}", dtype_name(dtype), shape, ())
    return list(described.values())


def is_elementwise(slot: Slot, tensor: LogicalTensor, shapes: Shapes) -> bool:
    """Whether a stored state has a value for each element of its parameter."""
    return slot.cut is not None or tensor.shape == shapes.get(slot.piece.name, slot.piece.whole)


def allocate(
    optimizer: torch.optim.Optimizer,
    slots: Iterable[Slot],
    stored: States,
    scalars: Scalars,
    record: dict[str, Any],
    same_dtype: set[str],
    kept: set[str],
    shapes: Shapes,
) -> None:
    """Give each holder exactly the states that the checkpoint has for it: new ones zeroed, others dropped. What is in ``kept``
    stays as it is."""
    int_steps, local = counts_in_ints(optimizer, record), set(record.get("local_states", []))
    for holder, shared in by_holder(slots):
        slot = shared[0]
        wanted, numbers = stored.get(slot.piece.name, {}), scalars.get(slot.piece.name, {})
        if slot.piece.name in kept:
            continue
        if not wanted and not numbers:
            optimizer.state.pop(holder, None)
            continue
        state = optimizer.state[holder]
        for key in [k for k in state if k not in wanted and k not in numbers]:
            del state[key]
        for key, tensor in wanted.items():
            if state.get(key) is None:
                if is_scalar(key, tensor.shape, slot.piece):
                    state[key] = _zero_scalar(optimizer, slot, key, tensor, int_steps)
                else:
                    dtype = _moment_dtype(slot, tensor, same_dtype)
                    state[key] = _zeros(slot, tensor, dtype, local=key in local, elementwise=is_elementwise(slot, tensor, shapes))


def _zero_scalar(optimizer: torch.optim.Optimizer, slot: Slot, key: str, tensor: LogicalTensor, int_steps: bool) -> Any:
    if key == "step" and int_steps:
        return 0
    group = optimizer.param_groups[slot.group]
    on_device = group.get("capturable") or group.get("fused")  # where torch's Adam keeps its step then
    return torch.zeros((), dtype=torch_dtype(tensor.dtype), device=slot.holder.device if on_device else "cpu")


def _zeros(slot: Slot, tensor: LogicalTensor, dtype: torch.dtype, *, local: bool, elementwise: bool) -> torch.Tensor:
    if local and isinstance(slot.holder, DTensor):
        return torch.zeros_like(local_of(slot.holder), dtype=dtype)
    if elementwise:
        return torch.zeros_like(slot.holder.detach(), dtype=dtype)
    if isinstance(slot.holder, DTensor):
        layout = tensor.parts[0].layout
        mesh = slot.holder.device_mesh
        dims = layout.dims if isinstance(layout, Grid) and len(layout.dims) == mesh.ndim else (REPLICATED,) * mesh.ndim
        return zeros(*tensor.shape, dtype=dtype, device_mesh=mesh, placements=[Replicate() if d == REPLICATED else Cut(d) for d in dims])
    return torch.zeros(tensor.shape, dtype=dtype, device=slot.holder.device)


def _moment_dtype(slot: Slot, tensor: LogicalTensor, same_dtype: set[str]) -> torch.dtype:
    """As stored, where the same optimizer made it for the same parameter dtype, and for integers; else the parameter's."""
    dtype = torch_dtype(tensor.dtype)
    if slot.piece.name in same_dtype:
        return dtype
    return slot.holder.dtype if dtype.is_floating_point and slot.holder.dtype.is_floating_point else dtype


def apply_scalars(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], scalars: Scalars) -> None:
    for holder, shared in by_holder(slots):
        for key, value in scalars.get(shared[0].piece.name, {}).items():
            live = optimizer.state[holder].get(key)
            if isinstance(live, torch.Tensor):
                local_of(live).fill_(value)
            else:
                optimizer.state[holder][key] = int(value) if key == "step" else value
