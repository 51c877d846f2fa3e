"""Which adapter a member gets, by what it is."""

from typing import Any

from torch import nn

from engine.errors import UsageError
from engine.state.objects import PerRank
from engine.state.optimizers import parts_of, split_member
from engine.state.plain import PlainAdapter
from engine.state.source import Adapter
from engine.state.zero import ZeroAdapter


def is_plain_state(member: Any) -> bool:
    """A sampler, say: an object with state of plain values that is no model."""
    model = isinstance(member, (tuple, nn.Module)) or hasattr(member, "zero_optimization_stage")
    stateful = hasattr(member, "state_dict") and hasattr(member, "load_state_dict") and not isinstance(member, type)
    return isinstance(member, PerRank) or (stateful and not model)


def adapter_for(name: str, member: Any) -> Adapter:
    """The adapter for what was given. Raises :class:`UsageError` for anything else."""
    first, *rest = member if isinstance(member, tuple) and member else (member,)
    if isinstance(first, nn.Module):
        optimizers, schedulers = split_member(name, tuple(rest))
        if hasattr(first, "zero_optimization_stage"):
            return ZeroAdapter(first, optimizers, schedulers)
        return PlainAdapter(first, parts_of(optimizers), schedulers)
    raise UsageError(
        f"member '{name}' is a {type(member).__name__}; give a DeepSpeed engine, a module, a tuple (module, optimizer[, scheduler]) of one or "
        "lists of several, or an object with state_dict and load_state_dict"
    )
