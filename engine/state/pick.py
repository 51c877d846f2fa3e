"""Which adapter a member gets, by what it is."""

from typing import Any

from torch import nn

from engine.errors import UsageError
from engine.state.objects import PerRank
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
    if hasattr(member, "zero_optimization_stage"):
        return ZeroAdapter(member)
    if isinstance(member, nn.Module):
        return PlainAdapter(member)
    if isinstance(member, tuple) and 1 <= len(member) <= 3 and isinstance(member[0], nn.Module):
        return PlainAdapter(*member)
    raise UsageError(
        f"member '{name}' is a {type(member).__name__}; give a DeepSpeed engine, a module, a tuple (module, optimizer[, scheduler]), "
        "or an object with state_dict and load_state_dict"
    )
