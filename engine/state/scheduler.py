"""The position of a learning-rate scheduler: where it is, not how it was configured (the resuming run decides that)."""

import inspect
from typing import Any

_POSITION = {"last_epoch", "last_batch_iteration"}  # constructor arguments in name only


def position(scheduler: Any) -> dict[str, Any]:
    """The scalars of its ``state_dict`` that its constructor does not take; nested schedulers likewise."""
    configured = set(inspect.signature(type(scheduler).__init__).parameters) - _POSITION
    state: dict[str, Any] = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, (bool, int, float, type(None))) and k not in configured}
    if hasattr(scheduler, "_schedulers"):
        state["_schedulers"] = [position(inner) for inner in scheduler._schedulers]
    return state


def restore_position(scheduler: Any, stored: dict[str, Any]) -> None:
    """Per-group learning rates are taken from the (already restored) param groups: groups may differ from the saved run's."""
    for inner, inner_stored in zip(getattr(scheduler, "_schedulers", []), stored.get("_schedulers", []), strict=True):
        restore_position(inner, inner_stored)
    state = scheduler.state_dict()
    state.update({k: v for k, v in stored.items() if k in state and k != "_schedulers"})
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    for key, field in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
        if key in state and all(field in group for group in groups):
            state[key] = [group[field] for group in groups]
    scheduler.load_state_dict(state)
