"""Which optimizers and schedulers a member has: wrappers taken off, several of them, one inside another."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from msgspec import Struct
from torch.optim import Optimizer

from engine.errors import UsageError


class Part(Struct, frozen=True):
    """One optimizer of a member. ``label`` is empty where it was given, else the attribute of another
    optimizer that holds it: its state then goes by that name, since both may keep state for one parameter."""

    label: str
    optimizer: Optimizer

    @property
    def has_hooks(self) -> bool:
        """Whether its steps can be watched: what is not a torch optimizer may have none."""
        return hasattr(self.optimizer, "_optimizer_step_pre_hooks") and hasattr(self.optimizer, "register_step_pre_hook")


def split_member(name: str, rest: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Return the optimizers and the schedulers of a member ``(module, *rest)``, as they were given.

    Each of ``rest`` is an optimizer, a scheduler, a list or dict of either, or None. Raises
    :class:`UsageError` naming what is neither.
    """
    optimizers, schedulers = list[Optimizer](), list[Any]()
    for item in _items(rest):
        if is_optimizer(item):
            optimizers.append(item)
        elif all(hasattr(item, method) for method in ("state_dict", "load_state_dict", "step")) and not hasattr(item, "unscale_"):
            schedulers.append(unwrap_scheduler(item))
        else:
            kind = type(item)
            raise UsageError(
                f"member '{name}': a {kind.__module__}.{kind.__qualname__} is neither an optimizer nor a learning-rate scheduler. Give "
                "(module, optimizer), (module, optimizer, scheduler) or lists of them; anything else with state_dict and load_state_dict, "
                "such as a grad scaler, is a member of its own"
            )
    return optimizers, schedulers


def _items(given: Any) -> Iterator[Any]:
    for item in given:
        if isinstance(item, list | tuple):
            yield from _items(item)
        elif isinstance(item, Mapping):
            yield from _items(item.values())
        elif item is not None:
            yield item


def is_optimizer(item: Any) -> bool:
    acts = hasattr(item, "step") and hasattr(item, "zero_grad") and hasattr(item, "state_dict")
    return isinstance(item, Optimizer) or acts


def unwrap_scheduler(scheduler: Any) -> Any:
    """Return the scheduler inside Accelerate's wrapper, which has no state of its own."""
    while type(scheduler).__name__ == "AcceleratedScheduler":
        scheduler = scheduler.scheduler
    return scheduler


def parts_of(given: Iterable[Optimizer]) -> list[Part]:
    """Return every optimizer that holds state: those given, without wrappers, and those inside them.

    Raises :class:`UsageError` for one whose state lies on one rank each, or that is given twice.
    """
    parts: list[Part] = []
    for optimizer in given:
        _add(Part("", _unwrapped(optimizer)), parts)
    return parts


def _add(part: Part, parts: list[Part]) -> None:
    optimizer = part.optimizer
    if any(optimizer is known.optimizer for known in parts):
        return
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise UsageError(
            "ZeroRedundancyOptimizer keeps the state of each parameter on one rank, and this version cannot save that. Use DeepSpeed ZeRO "
            "stage 1 or fully_shard, which shard optimizer state too, or the inner optimizer without it"
        )
    if not all(hasattr(optimizer, name) for name in ("state", "param_groups", "state_dict", "load_state_dict")):
        kind = type(optimizer)
        raise UsageError(
            f"{kind.__module__}.{kind.__qualname__} has no state and param groups of its own: its state cannot be found by parameter. Give the "
            "optimizer that it wraps, or give the wrapper as a member of its own"
        )
    parts.append(part)
    for label, inner in _inner(optimizer):
        if inner.state is not optimizer.state:
            _add(Part(f"{part.label}.{label}" if part.label else label, inner), parts)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside a wrapper that only forwards to it, such as Accelerate's."""
    for _, inner in _inner(optimizer):
        forwards = getattr(optimizer, "state", None) is inner.state and getattr(optimizer, "param_groups", None) is inner.param_groups
        if forwards and not hasattr(optimizer, "_optimizer_step_pre_hooks") and optimizer.state_dict().keys() <= {"state", "param_groups"}:
            return _unwrapped(inner)
    return optimizer


def _inner(optimizer: Any) -> Iterator[tuple[str, Optimizer]]:
    """Optimizers in attributes of an optimizer, also in lists and dicts, by a dotted name."""
    for name, value in vars(optimizer).items():
        for label, item in _nested(name, value):
            if isinstance(item, Optimizer):
                yield label, item


def _nested(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple) and value and not isinstance(value[0], torch.Tensor | Mapping):
        for number, inner in enumerate(value):
            yield f"{name}.{number}", inner
    elif isinstance(value, dict) and not name.startswith("_optimizer_") and name not in ("state", "defaults"):
        for key, inner in value.items():
            yield f"{name}.{key}", inner
    else:
        yield name, value


def described(optimizer: Optimizer) -> str:
    """Return the class of an optimizer for a message."""
    return type(optimizer).__name__
