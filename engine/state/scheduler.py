"""The position of a learning-rate scheduler: where it is, not how it was configured (the resuming run decides that)."""

import inspect
import logging
from typing import Any

from engine.errors import IncompatibleCheckpoint

logger = logging.getLogger("engine")

_POSITION = {"last_epoch", "last_batch_iteration"}  # constructor arguments in name only


def position(scheduler: Any) -> dict[str, Any]:
    """The scalars of its ``state_dict`` that its constructor does not take; nested schedulers likewise."""
    configured = set(inspect.signature(type(scheduler).__init__).parameters) - _POSITION
    state: dict[str, Any] = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (bool, int, float, type(None))) and k not in configured}
    state["class"] = type(scheduler).__name__
    if hasattr(scheduler, "_schedulers"):
        state["_schedulers"] = [position(inner) for inner in scheduler._schedulers]
    return state


def check_position(scheduler: Any, stored: dict[str, Any]) -> None:
    """Raises :class:`IncompatibleCheckpoint` for a chain of schedulers of another length."""
    here, there = len(getattr(scheduler, "_schedulers", [])), len(stored.get("_schedulers", []))
    if here != there and here and there:
        raise IncompatibleCheckpoint(f"the scheduler chains {here} schedulers here, {there} in the checkpoint; build the same chain")


def restore_position(scheduler: Any, stored: dict[str, Any]) -> None:
    """Per-group learning rates are taken from the (already restored) param groups: groups may differ from the saved run's.

    Another class of scheduler starts at the same step; DeepSpeed's count from -1, torch's from 0.
    """
    if stored.get("class") not in (None, type(scheduler).__name__):
        logger.warning("the schedule was a %s and is a %s now: it goes on from the same step", stored["class"], type(scheduler).__name__)
    for inner, inner_stored in zip(getattr(scheduler, "_schedulers", []), stored.get("_schedulers", []), strict=False):
        restore_position(inner, inner_stored)
    state = scheduler.state_dict()
    if "last_batch_iteration" in state and "last_epoch" in stored:
        stored = {"last_batch_iteration": stored["last_epoch"] - 1}
    elif "last_epoch" in state and "last_batch_iteration" in stored:
        stored = {"last_epoch": stored["last_batch_iteration"] + 1, "_step_count": stored["last_batch_iteration"] + 2}
    state.update({k: v for k, v in stored.items() if k in state and k != "_schedulers"})
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    for key, field in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        if key in state and all(field in group for group in groups):
            state[key] = [group[field] for group in groups]
    scheduler.load_state_dict(state)
