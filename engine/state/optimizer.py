"""Optimizer state and hyper-parameters by FQN, whatever tensors and scalars the optimizer keeps.

A state is a *scalar* if it is one number for the whole parameter (``step``), else a tensor: laid out like the parameter, or of
a shape of its own (factored states). Scalars are restored by value, tensors are filled in place. What is neither, such as a list
of tensors, is *nested*: taken apart by ``engine.state.values``.
"""

import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from msgspec import Struct
from torch.distributed.tensor import DTensor, Replicate, zeros
from torch.distributed.tensor import Shard as Cut

from engine.errors import CheckpointCorrupt, IncompatibleCheckpoint, LayoutError, UsageError
from engine.format.layout import REPLICATED, Absent, Grid, LogicalTensor, Part
from engine.format.record import Reference, Typed, decode_record, encode_record
from engine.state.parts import Held, held, join
from engine.state.plain import layout_of, local_of, replicated
from engine.state.shard import Shard, dtype_name, new_tensor, torch_dtype
from engine.state.source import Piece, Slot
from engine.state.values import OMIT, SMALL_BYTES, differing, fits, flatten, is_code, is_permuted, refuse, shown, small_array, unflatten

States = dict[str, dict[str, LogicalTensor]]
"""Stored optimizer tensors by live FQN and key."""

Scalars = dict[str, dict[str, Any]]
"""Scalar values by live FQN and key."""

Shapes = dict[str, tuple[int, ...]]
"""The stored shape of each parameter, by live FQN."""

# How a step is computed, not what it computes: these follow the resuming run, not the checkpoint.
_IMPLEMENTATION = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
# What schedulers keep in param groups.
SCHEDULED = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale"}
# What is reported where it differs from the checkpoint's; other values (schedule-free's k, weight_sum) are state that changes each step.
_TOLD = {"lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "rho", "amsgrad", "maximize", *SCHEDULED}
_LARGEST_F32_COUNT = 2**24
"""Up to here float32, torch's type for counts of steps, holds every integer."""
# Optimizers of known classes that keep other states for matrices than for vectors, such as a flat buffer.
_BY_SHAPE = {"Adafactor"}
_ADAM = {"Adam", "FusedAdam", "DeepSpeedCPUAdam", "AdamW", "CPUAdam"}


def family(optimizer: torch.optim.Optimizer) -> str:
    """The algorithm, whoever implements it: DeepSpeed's and torch's AdamW keep the same state."""
    name = type(optimizer).__name__
    if name in _ADAM and (name == "AdamW" or getattr(optimizer, "adam_w_mode", False)):
        return "AdamW"
    return "Adam" if name in _ADAM else name


def defaults_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return the settings of the constructor; what only acts like an optimizer may have none."""
    return getattr(optimizer, "defaults", {})


def is_scalar(key: str, shape: tuple[int, ...], piece: Piece) -> bool:
    """Return whether a stored state is one number for the whole parameter.

    A moment of a parameter with one element is a tensor like any other.
    """
    return math.prod(shape) == 1 and (key == "step" or shape != piece.shape)


def _is_live_scalar(key: str, value: torch.Tensor, slot: Slot) -> bool:
    if value.numel() != 1:
        return False
    if key == "step" or isinstance(value, DTensor):
        return is_scalar(key, tuple(value.shape), slot.piece)
    if slot.cut is not None:
        return value.numel() != slot.holder.numel()
    return value.shape != local_of(slot.holder).shape


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
                if _lies_permuted(value, slot):
                    continue  # among the nested
                if _is_live_scalar(key, value, slot):
                    shards[name] = tensor_shard(name, tuple(value.shape), replicated(), local_of(value))
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
                shards[name] = tensor_shard(name, (), replicated(), _count(value))
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


def refresh_int_steps(optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Take over the counts of now; returns whether the tensors can still hold them."""
    for holder, tensor in pairs:
        value = optimizer.state[holder]["step"]
        if abs(value) > _LARGEST_F32_COUNT and tensor.dtype != torch.float64:
            return False
        tensor.fill_(value)
    return True


def _count(value: int) -> torch.Tensor:
    """A count as a tensor that holds it exactly, whatever the default dtype and device are."""
    dtype = torch.float32 if abs(value) <= _LARGEST_F32_COUNT else torch.float64
    return torch.tensor(float(value), dtype=dtype, device="cpu")


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
    """Return the values that are no tensors and hold none, but for the int steps that :func:`state_shards` stores."""
    found = {}
    for slot in slots:
        state = optimizer.state.get(slot.holder, {})
        scalars = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor) and type(v) in _NUMBERS and not _counts_in_ints(k, v)}
        if scalars:
            found[slot.piece.name] = scalars
    return found


_NUMBERS = (bool, int, float, complex, str, bytes, type(None))


def nested_keys(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> list[tuple[Slot, str]]:
    """Return where the optimizer keeps values that are neither tensors nor numbers.

    Raises :class:`UsageError` for a state that is not a dict.
    """
    found = []
    for slot in slots:
        state = optimizer.state.get(slot.holder, {})
        if not isinstance(state, Mapping):
            raise UsageError(
                f"{type(optimizer).__name__} keeps a {type(state).__name__} for {slot.piece.name} where a dict of states is expected; "
                "this version cannot save it"
            )
        for key, value in state.items():
            plain = type(value) in _NUMBERS and fits(value)
            if _lies_permuted(value, slot) if isinstance(value, torch.Tensor) else not plain:
                found.append((slot, key))
            elif type(key) is not str:
                raise UsageError(f"{type(optimizer).__name__} keeps a state of {slot.piece.name} under {key!r}, which is not a text; rename it")
    return found


def _lies_permuted(value: torch.Tensor, slot: Slot) -> bool:
    """A state of a shape of its own whose memory is in a different order, which its next use in a sum depends on."""
    own = slot.cut is None and not isinstance(value, DTensor) and value.ndim > 1 and value.shape != slot.holder.shape
    return own and is_permuted(value)


def loose_keys(optimizer: torch.optim.Optimizer, slots: Iterable[Slot]) -> list[Any]:
    """Return the keys of the optimizer's state that are no parameters, such as MADGRAD's ``k``.

    Raises :class:`UsageError` for the state of a tensor that no param group holds.
    """
    state = optimizer.state
    holders = {id(slot.holder) for slot in slots}
    found = [key for key, value in state.items() if id(key) not in holders and not (isinstance(value, Mapping) and not value)]
    for key in found:
        if isinstance(key, torch.Tensor):
            raise UsageError(
                f"{type(optimizer).__name__} keeps a state for a tensor of shape {list(key.shape)} that is in none of its param groups; "
                "remove it from optimizer.state, or add the tensor to a group"
            )
    return found


def counts_in_ints(optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> bool:
    """Whether a new ``step`` is an int: as the same class had it when it saved, else as its makers do."""
    if record.get("optimizer_class") == type(optimizer).__name__:
        return bool(record.get("int_steps"))
    return type(optimizer).__module__.startswith("deepspeed.")


def local_states(optimizer: torch.optim.Optimizer) -> list[str]:
    """The keys of states that are plain tensors, shaped like the local shard, beside DTensor parameters.

    A count of shape ``(1,)`` is not one, though some shard may have that shape.
    """
    alike, larger = dict[str, bool](), set[str]()
    for holder, state in optimizer.state.items():
        if not isinstance(holder, DTensor):
            continue
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.ndim:
                alike[key] = alike.get(key, True) and value.shape == holder._local_tensor.shape
                if value.numel() > 1:
                    larger.add(key)
    return sorted(key for key, same in alike.items() if same and key in larger)


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
    states = [optimizer.state.get(slot.holder, {}) for slot in slots]
    record = {
        "optimizer": family(optimizer),
        "optimizer_class": type(optimizer).__name__,
        "int_steps": any(_counts_in_ints(k, v) for state in states for k, v in state.items()),
        "local_states": local_states(optimizer),
        "flat": is_flat(slots),
        "stateless": list(dict.fromkeys(slot.piece.name for slot, state in zip(slots, states, strict=True) if not state)),
    }
    here = () if is_flat(slots) else slots  # a rank has some of the parameters of a flat buffer only, and its record would be its own
    if empty := list(dict.fromkeys(slot.piece.name for slot in here if slot.holder in optimizer.state and not optimizer.state[slot.holder])):
        record["empty_states"] = empty
    has_numbers = any(not isinstance(value, torch.Tensor) for state in states for value in state.values())
    return Lasting(record, {group: list(found) for group, found in names.items()}, has_numbers)


def hyper_parameters(optimizer: torch.optim.Optimizer, names: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    """Return for each group its values, flattened, and the FQNs they hold for, ``names``."""
    return [{"params": names.get(i, []), "values": group_values(optimizer, i)} for i in range(len(optimizer.param_groups))]


def group_values(optimizer: torch.optim.Optimizer, number: int) -> dict[str, Any]:
    """Return a param group's values as a record holds them; functions are left out.

    Raises :class:`UsageError` naming a value of another type.
    """
    group = optimizer.param_groups[number]
    values = {}
    for key, value in group.items():
        if type(value) in _NUMBERS and key not in _IMPLEMENTATION and fits(value):
            values[key] = value
        elif key not in _IMPLEMENTATION:
            flat = _group_value(optimizer, number, key, value)
            if flat is not OMIT:
                values[key] = flat
    return values


def _group_value(optimizer: torch.optim.Optimizer, number: int, key: str, value: Any) -> Any:
    owner = f"{type(optimizer).__name__}, param group {number}"
    known = refuse(owner)

    if isinstance(value, enum.Enum) and key in defaults_of(optimizer):  # this program's constructor brings the class
        return Typed("enum", [type(value).__qualname__, value.name])

    def take(path: str, tensor: torch.Tensor) -> Any:
        if tensor.nbytes > SMALL_BYTES:
            raise UsageError(f"{owner}: {path} is a tensor of {tensor.nbytes} bytes; a group takes up to {SMALL_BYTES}. Keep it in optimizer.state")
        return small_array(local_of(tensor))

    return flatten(value, key, take, lambda path, inner: OMIT if is_code(inner) else known(path, inner))


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
    optimizer: torch.optim.Optimizer, chosen: dict[int, dict[str, Any]], override: Sequence[str], is_scheduled: bool = False
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the values to apply, where those of this run win that ``override`` names; and every difference, worded. Where a scheduler
    sets the rate here and there (``is_scheduled``), its present value is none: it differs at every resume.

    A rate under a scheduler (it has an ``initial_lr``) is overridden at its base: the present rate keeps its ratio to it.
    """
    settled, told = {}, []
    for number, stored in chosen.items():
        group, values = group_values(optimizer, number), dict(stored)
        scheduled = "initial_lr" in group and "initial_lr" in stored
        for key in [k for k in values if k in group and (k in _TOLD or k in override)]:
            if (key == "lr" and scheduled) or same_value(group[key], values[key]):
                continue
            name = "lr" if key == "initial_lr" else key
            wins = name in override
            if key == "lr" and is_scheduled and not wins:
                continue
            told.append(
                f"{type(optimizer).__name__}, param group {number}: {name} is {shown(group[key])} here and {shown(values[key])} in the checkpoint; "
                + ("this run's is used" if wins else f"the checkpoint's is used (override=({name!r},) takes this run's)")
            )
            if wins and key == "initial_lr":
                mine, theirs, rate = (_number(value) for value in (group[key], values[key], values["lr"]))
                values["lr"] = mine if not theirs else rate * mine / theirs
            if wins:
                values[key] = group[key]
        settled[number] = values
    return settled, told


def _number(value: Any) -> Any:
    """A number that may stand as a tensor in one run and not in another."""
    if isinstance(value, Typed) and value.kind == "enum":
        return tuple(value.value)
    value = unflatten(value, no_tensor)
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def no_tensor(reference: Reference) -> Any:
    raise CheckpointCorrupt(f"a param group refers to a tensor {reference.name}, which none of them has")


def same_value(a: Any, b: Any) -> bool:
    """Return whether two flattened values are equal, a number and a tensor of one element included."""
    if not differing(a, b):
        return True
    a, b = _number(a), _number(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, int | float | complex) and isinstance(b, int | float | complex) and a == b


def apply_hyper_parameters(optimizer: torch.optim.Optimizer, chosen: dict[int, dict[str, Any]], *, same_class: bool, scheduled: bool) -> None:
    """Give each group the values of ``chosen``, as the types that they had.

    A value that the constructor sets stays a tensor or a number, as this run has it. Where the checkpoint is of the same class of
    optimizer, a value that only steps set is added or removed. ``scheduled``: a scheduler keeps values in the groups as well.
    """
    torchs = type(optimizer).__module__.startswith("torch.optim")
    for number, values in chosen.items():
        group = optimizer.param_groups[number]
        device = next((p.device for p in group["params"]), None)
        for key, stored in values.items():
            if key in _IMPLEMENTATION or (key not in group and not same_class):
                continue
            live = group.get(key)
            if isinstance(stored, Typed) and stored.kind == "enum":
                if isinstance(live, enum.Enum):  # made by this program's own class
                    group[key] = type(live)[stored.value[1]]
                continue
            value = unflatten(stored, no_tensor, device)
            by_constructor = key in defaults_of(optimizer) or key in SCHEDULED or not same_class
            if isinstance(live, torch.Tensor) and (by_constructor or _alike_tensors(live, value)):
                live.copy_(value) if isinstance(value, torch.Tensor) else live.fill_(value)
            elif (
                isinstance(value, torch.Tensor)
                and value.numel() == 1
                and type(live) in (int, float)
                and by_constructor
                and (torchs or not same_class)
            ):
                group[key] = value.item()  # torch takes a rate as a tensor where it is captured in graphs
            else:
                group[key] = value
        if same_class:
            kept = {*values, *_IMPLEMENTATION, *defaults_of(optimizer), *(SCHEDULED if scheduled else ())}
            for key in [key for key in group if key not in kept and not is_code(group[key])]:
                del group[key]


def _alike_tensors(a: torch.Tensor, b: Any) -> bool:
    return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype


def by_holder(slots: Iterable[Slot]) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.holder), []).append(slot)
    for shared in groups.values():
        yield shared[0].holder, shared


def scalar_targets(prefix: str, slots: Iterable[Slot], stored: States) -> list[Shard]:
    """Temporaries for the stored scalars."""
    return [
        tensor_shard(f"{prefix}{name}.{key}", tensor.shape, replicated(), torch.zeros(tensor.shape, dtype=torch_dtype(tensor.dtype), device="cpu"))
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
            kind = (name in kept, tuple(sorted(stored.get(name, {}))), encode_record(scalars.get(name, {})))
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
        live = {key for key, value in state.items() if isinstance(value, torch.Tensor) and not _is_live_scalar(key, value, slot)}
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
    restored = {holder: set(state) for holder, state in optimizer.state.items() if isinstance(holder, torch.Tensor)}

    seen = False

    def check(*_: Any) -> None:
        nonlocal seen
        if seen:
            return
        seen = True
        for holder, keys in restored.items():
            new = sorted(key for key, value in optimizer.state[holder].items() if key not in keys and isinstance(value, torch.Tensor) and value.ndim)
            if new:
                raise IncompatibleCheckpoint(
                    f"{type(optimizer).__name__} has made {new} anew for a parameter of shape {tuple(holder.shape)}, of which the checkpoint had "
                    f"{sorted(keys)}: its states depend on how parameters are laid out. Resume under an engine of the kind that saved"
                )

    optimizer.register_step_post_hook(check)  # stays: hooks cannot be removed while they run


def _told(kind: Any) -> str:
    kept, states, scalars = kind
    if kept:
        return "no place in the optimizer"
    return f"{decode_record(scalars)}" if states else "no optimizer state"


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
    nested: Mapping[str, Set[str]],
) -> None:
    """Give each holder exactly the states that the checkpoint has for it: new ones zeroed, others dropped. What is in ``kept``
    stays as it is; ``nested`` are the keys by parameter that are restored later."""
    int_steps, local = counts_in_ints(optimizer, record), set(record.get("local_states", []))
    empty = set(record.get("empty_states", []))
    for holder, shared in by_holder(slots):
        slot = shared[0]
        wanted, numbers = stored.get(slot.piece.name, {}), scalars.get(slot.piece.name, {})
        later = nested.get(slot.piece.name, ())
        if slot.piece.name in kept:
            continue
        if not wanted and not numbers and not later:
            optimizer.state.pop(holder, None)
            if slot.piece.name in empty:
                optimizer.state[holder] = {}
            continue
        state = optimizer.state[holder]
        for key in [k for k in state if k not in wanted and k not in numbers and k not in later]:
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
    return torch.zeros(tensor.shape, dtype=torch_dtype(tensor.dtype), device=slot.holder.device if on_device else "cpu")


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
    return new_tensor(tensor, dtype, slot.holder.device)


def _moment_dtype(slot: Slot, tensor: LogicalTensor, same_dtype: set[str]) -> torch.dtype:
    """As stored, where the same optimizer made it for the same parameter dtype, and for integers; else the parameter's."""
    dtype = torch_dtype(tensor.dtype)
    if slot.piece.name in same_dtype:
        return dtype
    return slot.holder.dtype if dtype.is_floating_point and slot.holder.dtype.is_floating_point else dtype


def apply_scalars(optimizer: torch.optim.Optimizer, slots: Iterable[Slot], scalars: Scalars, stored: States) -> None:
    """Restore scalars by value. A count that was stored as a tensor is an int where the optimizer counts in ints."""
    for holder, shared in by_holder(slots):
        name = shared[0].piece.name
        for key, value in scalars.get(name, {}).items():
            live = optimizer.state[holder].get(key)
            if isinstance(live, torch.Tensor):
                local_of(live).fill_(value)
            else:
                optimizer.state[holder][key] = int(value) if key == "step" and key in stored.get(name, {}) else value
