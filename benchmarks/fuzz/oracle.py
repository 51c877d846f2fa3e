"""What a program holds, gathered whole by torch's and DeepSpeed's own means, and a bitwise comparison with exact types.

Nothing here knows how the engine saves. Values become plain trees: ``Dict`` and ``Sequence`` keep the types of containers, tensors are
whole copies.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import random
import struct
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.fuzz.program import Program


@dataclasses.dataclass
class Held:
    """``shared``: alike on all ranks, by a readable name. ``own``: this rank's. ``untouched``: what no checkpoint is for, and no resume
    may change either."""

    shared: dict[str, Any]
    own: dict[str, Any]
    untouched: dict[str, Any]

    def everything(self) -> dict[str, Any]:
        return {**self.shared, **self.own, **self.untouched}


@dataclasses.dataclass
class Dict:
    kind: str
    items: list[tuple[Any, Any]]


@dataclasses.dataclass
class Sequence:
    kind: str
    items: list[Any]


@dataclasses.dataclass
class Fragment:
    """Of a tensor that DeepSpeed keeps in flat pieces: where this rank's piece lies in the whole, and its elements."""

    start: int
    data: torch.Tensor


def gather(program: Program) -> Held:
    """Return all that a program holds. Every rank calls this."""
    shared, own, untouched = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    flats = _Flats(program) if program.deepspeed is not None else None
    names = {id(p): name for name, p in program.module.named_parameters()}
    for name, p in program.module.named_parameters():
        with program.gathered(p):
            shared[f"parameter {name}"] = copied(p.data)
    if flats is not None:
        shared |= {f"master {name}": flats.cut(p, flats.flat(p)) for name, p in flats.named()}
    for prefix, module in program.module.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            is_saved = leaf not in module._non_persistent_buffers_set
            (shared if is_saved else untouched)[f"buffer {name}"] = copied(buffer)
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            shared[f"extra state {prefix}"] = copied(module.get_extra_state())
        for key, value in _further_entries(module).items():
            shared[f"entry {prefix}.{key}"] = copied(value)
    for i, optimizer in enumerate(program.optimizers):
        _gather_optimizer(f"optimizer {i}", optimizer, names, flats, shared)
        shared |= _unlisted(f"optimizer {i}", optimizer)
    for i, scheduler in enumerate(program.schedulers):
        if scheduler is not None:
            shared[f"scheduler {i}"] = copied(scheduler.state_dict())
            shared |= _unlisted(f"scheduler {i}", scheduler)
    for name, made in program.objects.items():
        if name == "sampler":
            continue  # its state is where samples go on, which training shows
        is_own = name in ("position", "apart")
        (own if is_own else shared)[f"member {name}"] = copied(made.state_dict())
    if program.deepspeed is not None:
        counters = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
        shared["counters"] = copied({name: int(getattr(program.deepspeed, name)) for name in counters})
    own["random state"] = [
        random.getstate(),
        copied(np.random.get_state()),
        copied(torch.get_rng_state()),
    ]
    _put_together(shared, own)
    return Held(shared, own, untouched)


def _further_entries(module: torch.nn.Module) -> dict[str, Any]:
    """What a module adds to its state dict by a method of its own."""
    kind = type(module)
    if kind._save_to_state_dict is torch.nn.Module._save_to_state_dict or kind.__module__.startswith("torch."):
        return {}
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, "", False)
    return {key: found[key] for key in found.keys() - module._parameters.keys() - module._buffers.keys()}


def _unlisted(label: str, owner: Any) -> dict[str, Any]:
    """What it keeps beside its state dict."""
    held = {name: getattr(owner, name) for name in getattr(owner, "kept", ())}
    return {f"{label} keeps {name}": copied(value) for name, value in held.items()}


def _gather_optimizer(label: str, optimizer: Any, names: dict[int, str], flats: _Flats | None, into: dict[str, Any]) -> None:
    if (inner := getattr(optimizer, "base", None) or getattr(optimizer, "inner", None)) is not None:
        _gather_optimizer(f"{label} inside", inner, names, flats, into)
    if not isinstance(optimizer, torch.optim.Optimizer):
        further = {key: value for key, value in optimizer.state_dict().items() if key != "inner"}
        into[f"{label} entries"] = copied(further)
        return
    if flats is not None:
        groups, states = flats.groups(), {name: flats.state(p) for name, p in flats.named()}
        parameters = {id(flat) for flat in flats.flats}
        rest = {key: value for key, value in optimizer.state.items() if id(key) not in parameters}
        further: dict[str, Any] = {}
    else:
        plain = optimizer.state_dict()
        # DeepSpeed's groups do not hold what has no elements
        groups = [[names[id(p)] for p in group["params"] if p.requires_grad and p.numel()] for group in optimizer.param_groups]
        by_index: dict[Any, tuple[str, Any]] = {}
        for group, packed in zip(optimizer.param_groups, plain["param_groups"], strict=True):
            by_index |= {index: (names[id(p)], p) for index, p in zip(packed["params"], group["params"], strict=True)}
        # nor keep a state for it, which could have no effect
        states = {by_index[k][0]: _localised(v, by_index[k][1]) for k, v in plain["state"].items() if k in by_index and by_index[k][1].numel()}
        rest = {k: v for k, v in plain["state"].items() if k not in by_index}
        further = {k: v for k, v in plain.items() if k not in ("state", "param_groups")}
    for i, group in enumerate(optimizer.param_groups):
        into[f"{label} group {i}"] = copied({k: v for k, v in group.items() if k != "params"})
        into[f"{label} group {i} holds"] = sorted(groups[i])
    for name, state in states.items():
        if state:
            into[f"{label} state of {name}"] = copied(state)
    for key, value in rest.items():
        if value != {}:
            into[f"{label} state under {key}"] = copied(value)
    for key, value in further.items():
        into[f"{label} entry {key}"] = copied(value)
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "tally") and flats is not None:
        into[f"{label} entry tally"] = copied(optimizer.state_dict()["tally"])


def _localised(value: Any, parameter: Any) -> Any:
    """Plain tensors beside a DTensor: pieces of it, where they are so on all ranks."""
    if isinstance(value, dict):
        return {key: _localised(inner, parameter) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_localised(inner, parameter) for inner in value)
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.ndim:
        return Apart(value.detach().clone(), value.shape == parameter._local_tensor.shape)
    return value


@dataclasses.dataclass
class Apart:
    """A tensor that may differ by rank. ``is_piece``: it looks like this rank's rows of a whole."""

    value: torch.Tensor
    is_piece: bool = False


class _Flats:
    """Where DeepSpeed keeps the masters and states of each parameter, as its own accessors look them up."""

    def __init__(self, program: Program) -> None:
        self._wrapper: Any = program.deepspeed.optimizer
        self._names = [(name, p) for name, p in program.module.named_parameters() if p.requires_grad]
        w = self._wrapper
        if program.side.engine == "zero3":
            self.flats, self._groups = w.fp32_partitioned_groups_flat, w.fp16_groups
        elif hasattr(w, "single_partition_of_fp32_groups"):
            self.flats, self._groups = w.single_partition_of_fp32_groups, w.bit16_groups
        else:
            self.flats, self._groups = w.fp32_groups_flat_partition, w.bf16_groups
        self._is_zero3 = program.side.engine == "zero3"
        self._number = {id(p): i for i, group in enumerate(self._groups) for p in group}

    def named(self) -> list[tuple[str, Any]]:
        """Parameters that have a place in it: empty ones have none."""
        return [(name, p) for name, p in self._names if id(p) in self._number]

    def groups(self) -> list[list[str]]:
        names = {id(p): name for name, p in self._names}
        w = self._wrapper
        found: list[list[str]] = [[] for _ in w.optimizer.param_groups]
        for i, group in enumerate(self._groups):
            number = w.sub_group_to_group_id[i] if self._is_zero3 else i
            found[number] += [names[id(p)] for p in group]
        return found

    def flat(self, p: Any) -> torch.Tensor:
        return self.flats[self._number[id(p)]]

    def state(self, p: Any) -> dict[Any, Any]:
        flat = self.flat(p)
        return self._cut_all(p, flat, dict(self._wrapper.optimizer.state.get(flat, {})))

    def _cut_all(self, p: Any, flat: torch.Tensor, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._cut_all(p, flat, inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut_all(p, flat, inner) for inner in value)
        if isinstance(value, torch.Tensor) and value.ndim:
            return self.cut(p, value) if value.shape == flat.shape else Apart(value)
        return value

    def cut(self, p: Any, value: torch.Tensor) -> Whole:
        """This rank's piece of what a flat tensor has for a parameter."""
        if self._is_zero3:
            _, begin, count = self._wrapper.grad_position[self._wrapper.get_param_id(p)]
            start = dist.get_rank(p.ds_process_group) * count
            count = max(0, min(count, p.ds_numel - start))
            shape = tuple(p.ds_shape)
        else:
            mapping, shape = p._hp_mapping, tuple(p.shape)
            begin = count = start = 0
            if mapping is not None:
                begin, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                start = mapping.lp_fragment_address.start
        return Whole(shape, Fragment(start, value.detach().narrow(0, begin, count).clone()))


@dataclasses.dataclass
class Whole:
    """To be put together from all ranks' fragments."""

    shape: tuple[int, ...]
    piece: Any


def copied(value: Any) -> Any:
    """A plain copy that keeps every type."""
    if isinstance(value, Whole | Apart):
        return value
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.nn.Parameter):
        return Sequence("Parameter", [value.detach().clone()])
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, torch.Generator):
        return Sequence("Generator", [value.get_state().clone()])
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        kind = type(value).__qualname__
        items = [(copied(key), copied(inner)) for key, inner in value.items()]
        if isinstance(value, collections.defaultdict):
            kind += f" of {value.default_factory}"
        return Dict(kind, items)
    if isinstance(value, (list, tuple, collections.deque)):
        return Sequence(type(value).__qualname__, [copied(inner) for inner in value])
    if isinstance(value, (set, frozenset)):
        return Sequence(type(value).__qualname__, sorted(map(copied, value), key=repr))
    if isinstance(value, io.BytesIO):
        return Sequence("BytesIO", [value.getvalue()])
    if dataclasses.is_dataclass(value):
        return Dict(
            type(value).__qualname__,
            [(f.name, copied(getattr(value, f.name))) for f in dataclasses.fields(value)],
        )
    if (state := getattr(value, "state_dict", None)) is not None:
        return Dict(f"object {type(value).__qualname__}", [("state_dict()", copied(state()))])
    if isinstance(value, (type(None), bool, int, float, complex, str, bytes, bytearray, enum.Enum, np.generic)):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"the oracle does not know how to copy a {type(value).__name__}")


def _put_together(shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Make whole tensors of fragments, and sort out what differs by rank: one round for all of them."""
    waiting: dict[str, Whole | Apart] = {}
    for name, value in shared.items():
        _collect(name, value, waiting)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, waiting)
    results: dict[str, Any] = {}
    for path, value in waiting.items():
        every = [by_rank[path] for by_rank in found]
        if isinstance(value, Whole):
            results[path] = _assembled([one.piece for one in every], value.shape)
        elif all(one.is_piece for one in every):
            results[path] = torch.cat([one.value for one in every])
        elif all(alike(value.value, one.value) for one in every):
            results[path] = copied(value.value)
        else:
            results[path] = f"each rank's own, on {len(every)} ranks"
            own[path] = copied(value.value)
    for name in list(shared):
        shared[name] = _replaced(name, shared[name], results)


def _assembled(pieces: list[Fragment], shape: tuple[int, ...]) -> torch.Tensor:
    whole = torch.zeros(int(np.prod(shape)), dtype=pieces[0].data.dtype)
    for piece in pieces:
        whole[piece.start : piece.start + piece.data.numel()] = piece.data
    return whole.reshape(shape)


def _collect(path: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Whole | Apart):
        into[path] = value
    for key, inner in _inner(value):
        _collect(f"{path} {key}", inner, into)


def _inner(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Dict):
        return value.items
    return list(enumerate(value.items)) if isinstance(value, Sequence) else []


def _replaced(path: str, value: Any, results: dict[str, Any]) -> Any:
    if path in results:
        return results[path]
    if isinstance(value, Dict):
        return Dict(
            value.kind,
            [(key, _replaced(f"{path} {key}", inner, results)) for key, inner in value.items],
        )
    if isinstance(value, Sequence):
        return Sequence(
            value.kind,
            [_replaced(f"{path} {i}", inner, results) for i, inner in enumerate(value.items)],
        )
    return value


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Return where two copies differ, in words: types exactly, numbers and tensors bitwise."""
    if isinstance(was, dict) and isinstance(now, dict):
        was, now = Dict("", list(was.items())), Dict("", list(now.items()))
    if type(was) is not type(now):
        return [f"{path}: {_worded(was)} became {_worded(now)}"]
    if isinstance(was, Dict):
        if was.kind != now.kind:
            return [f"{path}: a {was.kind} became a {now.kind}"]
        return _differing_items(was, now, path)
    if isinstance(was, Sequence):
        if was.kind != now.kind or len(was.items) != len(now.items):
            return [f"{path}: {_worded(was)} became {_worded(now)}"]
        pairs = zip(was.items, now.items, strict=True)
        return [line for i, (a, b) in enumerate(pairs) for line in differences(a, b, f"{path}[{i}]")]
    if isinstance(was, list):
        return differences(Sequence("list", was), Sequence("list", now), path)
    return [] if alike(was, now) else [f"{path}: {_worded(was)} became {_worded(now)}"]


def _differing_items(was: Dict, now: Dict, path: str) -> list[str]:
    """Keys are told apart by type too: 1, 1.0 and True are three keys of a record."""
    mine = {(type(k).__name__, repr(k)): v for k, v in was.items}
    its = {(type(k).__name__, repr(k)): v for k, v in now.items}
    found = []
    for key in mine.keys() | its.keys():
        at = f"{path} {key[1]}".strip() if path else key[1].strip("'")
        if key not in its:
            found.append(f"{at}: lost, was {_worded(mine[key])}")
        elif key not in mine:
            found.append(f"{at}: new, is {_worded(its[key])}")
        else:
            found += differences(mine[key], its[key], at)
    return sorted(found)


def alike(a: Any, b: Any) -> bool:
    """Whether two leaves are of one type and the same to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
            return False
        if a.layout is not torch.strided:
            return alike(a.to_dense(), b.to_dense())
        return torch.equal(_bits(a), _bits(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return alike(a.real, b.real) and alike(a.imag, b.imag)
    if isinstance(a, np.generic):
        return a.tobytes() == b.tobytes()
    return bool(a == b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.zeros(0, dtype=torch.uint8)


def _worded(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        name = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return f"{name} {value.reshape(-1)[:3].tolist()}" if value.layout is torch.strided and value.numel() else name
    if isinstance(value, (Dict, Sequence)):
        inner = [f"{k}" for k, _ in value.items] if isinstance(value, Dict) else [_worded(v) for v in value.items]
        return f"{value.kind}({', '.join(inner)[:80]})"
    return f"{type(value).__name__} {value!r}"[:80]
