"""State that an object keeps in attributes and its ``state_dict`` does not list.

Some optimizers and schedulers count or draw numbers outside of what they list: plain values that their
methods assign, a random generator, a scheduler inside. What only a constructor assigns is a setting of
this run, and may differ by rank.
"""

import dis
from collections.abc import Mapping
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch.optim import Optimizer

from engine.errors import UsageError
from engine.format.record import Typed
from engine.state.values import OMIT, SMALL_BYTES, flatten, refuse, small_array, unflatten

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TORCHS_OWN = ("_step_count", "_opt_called", "_is_initial", "_get_lr_called_within_step", "_zero_grad_profile_name")
_NOT_STEPS = ("__init__", "__setstate__", "load_state_dict", "add_param_group")


class Attributes:
    """The attributes of one object, as they were when this was made, and what has become of them."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._first = {name: value for name, value in self._own() if type(value) in _PLAIN}
        self._changing = set(assigned_by_methods(type(owner)))

    def _own(self) -> list[tuple[str, Any]]:
        names = getattr(self._owner, "__dict__", {})
        return [(name, value) for name, value in names.items() if name not in _TORCHS_OWN]

    def capture(self, listed: set[str]) -> dict[str, Any]:
        """Return what is to be saved by name, but for what the state dict has ``listed``."""
        found = {}
        for name, value in self._own():
            if name in listed:
                continue
            if type(value) in _PLAIN:
                if name in self._changing or name not in self._first or self._first[name] != value:
                    self._changing.add(name)
                    found[name] = value
            elif name in self._changing and (plain := _flat(value, name)) is not OMIT:
                found[name] = plain
            elif isinstance(value, torch.Generator):
                found[name] = flatten(value, name, lambda _, tensor: small_array(tensor), lambda *_: OMIT)
            elif _is_scheduler(value):
                state = flatten(value.state_dict(), name, lambda _, tensor: small_array(tensor), lambda *_: OMIT)
                found[name] = Typed("stateful", {"class": type(value).__name__, "state": state})
        return found

    def restore(self, stored: Mapping[str, Any]) -> None:
        for name, plain in stored.items():
            live: Any = getattr(self._owner, name, None)
            if isinstance(plain, Typed) and plain.kind == "stateful":
                if _is_scheduler(live):
                    live.load_state_dict({**live.state_dict(), **unflatten(plain.value["state"], _no_tensor)})
            elif isinstance(live, torch.Generator):
                live.set_state(unflatten(plain, _no_tensor).get_state())
            else:
                setattr(self._owner, name, unflatten(plain, _no_tensor))
                self._changing.add(name)


@lru_cache(256)
def assigned_by_methods(kind: type) -> frozenset[str]:
    """Return the names that the methods of a class assign as attributes, but for its constructor."""
    own = [
        base for base in kind.__mro__ if base not in (*Optimizer.__mro__, *torch.nn.Module.__mro__) and base.__module__ != "torch.optim.lr_scheduler"
    ]
    methods = [method for base in own for name, method in vars(base).items() if isinstance(method, FunctionType) and name not in _NOT_STEPS]
    code = [getattr(method, "__wrapped__", method).__code__ for method in methods]
    return frozenset(one.argval for part in code for one in dis.get_instructions(part) if one.opname == "STORE_ATTR")


def _flat(value: Any, name: str) -> Any:
    """A small container of plain values and small tensors, or OMIT for anything else: it may be a cache."""
    if not isinstance(value, list | tuple | dict | set | torch.Tensor):
        return OMIT
    try:
        return flatten(value, name, _small, refuse("an attribute"))
    except UsageError:
        return OMIT


def _small(path: str, tensor: torch.Tensor) -> Any:
    if tensor.nbytes > SMALL_BYTES or hasattr(tensor, "_local_tensor") or tensor.requires_grad:
        raise UsageError(f"{path} is too large for a record")
    return small_array(tensor)


def _is_scheduler(value: Any) -> bool:
    stateful = all(hasattr(value, method) for method in ("state_dict", "load_state_dict", "step"))
    return stateful and not hasattr(value, "zero_grad") and not isinstance(value, type | Optimizer | torch.nn.Module)


def _no_tensor(reference: Any) -> Any:
    raise KeyError(reference.name)
