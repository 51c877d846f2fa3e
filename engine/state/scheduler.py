"""The state of a learning-rate scheduler: all that its own ``state_dict`` lists, and what it holds.

One rule for settings and position alike: the checkpoint's values are used, each setting that differs
is reported, and ``override`` names those of which this run's values win.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import IncompatibleCheckpoint
from engine.format.record import Reference
from engine.state.attributes import Attributes
from engine.state.optimizers import is_optimizer, unwrap_scheduler
from engine.state.values import MISSING, OMIT, Typed, differing, flatten, is_code, refuse, shown, small_array, unflatten

logger = logging.getLogger("engine")

_RATES = {"base_lrs": "initial_lr", "_last_lr": "lr"}
"""Rates that a scheduler keeps per param group, and the group's own name for each."""

_POSITION = {"last_epoch", "last_batch_iteration"}  # constructor arguments in name only


class Schedule:
    """A scheduler of a member: its state, and what it keeps in attributes that its state does not list."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._attributes = Attributes(scheduler)

    def capture(self) -> dict[str, Any]:
        """Return the state as a record holds it. Raises as :func:`capture` does."""
        stored = capture(self.scheduler)
        attributes = self._attributes.capture({*stored, *_names_of(self.scheduler)})
        return {**stored, _ATTRIBUTES: attributes} if attributes else stored

    def check(self, stored: dict[str, Any], override: Sequence[str]) -> list[str]:
        return check(self.scheduler, _listed(stored), override)

    def restore(self, stored: dict[str, Any], groups: Sequence[Mapping[str, Any]], override: Sequence[str]) -> None:
        restore(self.scheduler, _listed(stored), groups, override)
        if stored.get("class") == type(self.scheduler).__name__:
            self._attributes.restore(stored.get(_ATTRIBUTES, {}))

    def explain(self, stored: dict[str, Any], override: Sequence[str]) -> list[tuple[str, Any, Any]]:
        return explain(self.scheduler, _listed(stored), override)


_ATTRIBUTES = "attributes of the object"  # no state dict has a key of this name


def _listed(stored: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stored.items() if key != _ATTRIBUTES}


def _names_of(scheduler: Any) -> set[str]:
    state = scheduler.state_dict()
    return {str(key) for key in state} if isinstance(state, Mapping) else set()


def capture(scheduler: Any) -> dict[str, Any]:
    """Return the state as a record holds it, with its ``class``.

    A scheduler inside it is taken apart alike. Functions are left out: they are the program's. Raises
    :class:`UsageError` for a value that a record cannot hold.
    """
    state = _flat(scheduler, scheduler.state_dict())
    return {"class": type(scheduler).__name__, **(state if type(state) is dict else {"state": state})}


def _flat(scheduler: Any, state: Any) -> Any:
    known = refuse(f"the scheduler {type(scheduler).__name__}")

    def unknown(path: str, value: Any) -> Any:
        if is_code(value) or is_optimizer(value):
            return OMIT
        if _is_stateful(value):
            inner = unwrap_scheduler(value)
            return Typed("stateful", {"class": type(inner).__name__, "state": _flat(inner, inner.state_dict())})
        return known(path, value)

    return flatten(state, "state", lambda _, tensor: small_array(tensor), unknown)


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, type)


def check(scheduler: Any, stored: dict[str, Any], override: Sequence[str] = ()) -> list[str]:
    """Return how this run's settings differ from the checkpoint's, worded for the log.

    Raises :class:`IncompatibleCheckpoint` for a chain of a different number of schedulers.
    """
    here, there = len(getattr(scheduler, "_schedulers", [])), len(stored.get("_schedulers", []))
    if here != there and here and there:
        raise IncompatibleCheckpoint(
            f"the scheduler {type(scheduler).__name__} chains {here} schedulers here, {there} in the checkpoint; build the same chain"
        )
    if stored.get("class") not in (None, type(scheduler).__name__):
        return [f"the schedule was a {stored['class']} and is a {type(scheduler).__name__} now: it goes on from the same step"]
    return _changed_settings(scheduler, capture(scheduler), stored, override)


def _changed_settings(scheduler: Any, live: Mapping[str, Any], stored: Mapping[str, Any], override: Sequence[str]) -> list[str]:
    lines, settings = [], set(inspect.signature(type(scheduler).__init__).parameters) - _POSITION
    for key in sorted(settings & live.keys() & stored.keys()):
        if isinstance(live[key], Typed) and live[key].kind == "stateful":
            inner, theirs = getattr(scheduler, key, None), _inner_state(stored[key])
            if inner is not None and isinstance(theirs, dict):
                lines += _changed_settings(unwrap_scheduler(inner), _inner_state(live[key]), theirs, override)
        elif differing(live[key], stored[key]):
            used = "this run's is used" if key in override else f"the checkpoint's is used (override=({key!r},) takes this run's)"
            lines.append(f"{type(scheduler).__name__}: {key} is {shown(live[key])} here and {shown(stored[key])} in the checkpoint; {used}")
    inner_live, inner_stored = live.get("_schedulers"), stored.get("_schedulers")
    if isinstance(inner_live, list | tuple) and isinstance(inner_stored, list | tuple):
        for inner, mine, theirs in zip(getattr(scheduler, "_schedulers", []), inner_live, inner_stored, strict=False):
            if isinstance(mine, dict) and isinstance(theirs, dict):
                lines += _changed_settings(inner, mine, theirs, override)
    return lines


def _inner_state(plain: Any) -> Any:
    return plain.value["state"] if isinstance(plain, Typed) and isinstance(plain.value, dict) and "state" in plain.value else {}


def restore(scheduler: Any, stored: dict[str, Any], groups: Sequence[Mapping[str, Any]], override: Sequence[str] = ()) -> None:
    """Restore the state. ``groups``: what the optimizer's param groups will hold after the resume.

    A scheduler of a different class goes on from the same step; DeepSpeed's count from -1, torch's from 0.
    """
    live = scheduler.state_dict()
    if stored.get("class") not in (None, type(scheduler).__name__):
        state = _translated(live, stored)
    elif type(live) is dict:
        state = _merged(live, {key: value for key, value in stored.items() if key != "class"}, override)
    else:
        state = unflatten(stored.get("state"), _no_tensor)
    if isinstance(state, dict):
        _settle_rates(state, live, groups, override)
    scheduler.load_state_dict(state)


def _merged(live: Any, stored: dict[Any, Any], override: Sequence[str]) -> dict[Any, Any]:
    """The stored state; functions, and what only the live one has, from the live one."""
    state = dict(live)
    for key, value in stored.items():
        if key in override and key in live:
            continue
        state[key] = _value(live.get(key), value, override)
    return state


def _value(live: Any, stored: Any, override: Sequence[str]) -> Any:
    if isinstance(stored, Typed) and stored.kind == "stateful":
        if not _is_stateful(live):
            raise IncompatibleCheckpoint(
                f"the scheduler held a {stored.value.get('class')} when it was saved, and holds none here; build the same one"
            )
        inner, state = unwrap_scheduler(live), stored.value["state"]
        merged = _merged(inner.state_dict(), state, override) if isinstance(state, dict) else unflatten(state, _no_tensor)
        inner.load_state_dict(merged)
        return live
    if isinstance(stored, dict) and isinstance(live, dict):
        return _merged(live, stored, override)
    if isinstance(stored, list | tuple) and isinstance(live, list | tuple) and any(map(_holds_more, live)) and len(live) == len(stored):
        return type(stored)(_value(mine, theirs, override) for mine, theirs in zip(live, stored, strict=True))
    device = live.device if isinstance(live, torch.Tensor) else None
    return unflatten(stored, _no_tensor, device)


def _holds_more(value: Any) -> bool:
    return isinstance(value, dict) or _is_stateful(value)


def _translated(live: Any, stored: dict[str, Any]) -> dict[str, Any]:
    state = dict(live)
    if "last_batch_iteration" in live and "last_epoch" in stored:
        state["last_batch_iteration"] = stored["last_epoch"] - 1
    elif "last_epoch" in live and "last_batch_iteration" in stored:
        state |= {"last_epoch": stored["last_batch_iteration"] + 1, "_step_count": stored["last_batch_iteration"] + 2}
    else:
        settings = (bool, int, float, type(None))
        state |= {k: v for k, v in stored.items() if k in live and isinstance(v, settings) and k in ("last_epoch", "_step_count", *_POSITION)}
    return state


def _settle_rates(state: dict[Any, Any], live: Any, groups: Sequence[Mapping[str, Any]], override: Sequence[str]) -> None:
    """Take the rates per group from the groups where their number has changed, or this run's win."""
    for key, name in _RATES.items():
        if key not in state or not all(name in group for group in groups) or not groups:
            continue
        if len(state[key]) != len(groups) or "lr" in override or "initial_lr" in override:
            state[key] = [group[name] for group in groups]
    for inner in state.get("_schedulers", ()):
        if isinstance(inner, dict):
            _settle_rates(inner, live, groups, override)


def explain(scheduler: Any, stored: dict[str, Any], override: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return where the state is not as stored after a resume, but for what this run's settings explain."""
    if stored.get("class") not in (None, type(scheduler).__name__):
        return []
    live = capture(scheduler)
    found = differing({key: value for key, value in stored.items() if key != "class"}, {k: v for k, v in live.items() if k != "class"})
    rates = {"base_lrs", "_last_lr"}
    return [
        (path, theirs, mine)
        for path, theirs, mine in found
        if theirs is not MISSING
        and not set(path.split(".")) & set(override)
        and not (set(path.split(".")) & rates and _settled(override, theirs, mine))
    ]


def _settled(override: Sequence[str], stored: Any, live: Any) -> bool:
    return "lr" in override or "initial_lr" in override or stored is MISSING or live is MISSING or type(stored) is list


def _no_tensor(reference: Reference) -> Any:
    raise IncompatibleCheckpoint(f"a scheduler's state refers to a tensor {reference.name}, which none of them has")
