"""What a module lists in its state dict besides parameters and buffers: extra state, and what hooks add.

Of each rank's own, as FP8 scales are. Large tensors are one of all ranks, compared like other replicas.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engine.errors import UsageError
from engine.state.attributes import assigned_by_methods
from engine.state.carried import Carried
from engine.state.names import Names, normalise
from engine.state.shard import Shard
from engine.state.values import refuse

logger = logging.getLogger("engine")

_EXTRA = "_extra_state"


class ExtraState:
    """The extra state of one module. ``base`` begins the names of its tensors.

    Raises :class:`UsageError` for what the module lists and would not take back.
    """

    def __init__(self, module: nn.Module, names: Names, base: str) -> None:
        self._module, self._base = module, base
        self._owners: dict[str, nn.Module] = {}
        self._listed: dict[str, str] = {}
        if not any(map(_may_list_more, module.modules())):
            return
        known = {*names.raw, *(normalise(raw, peft=names.peft) for raw in names.raw)}
        known |= {*names.aliases, *(place.name for place in names.places.values())}  # what consists of parameters
        held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        state = module.state_dict(keep_vars=True)
        for raw, value in state.items():
            if raw in known or normalise(raw, peft=names.peft) in known or id(value) in held:  # a wrapper's hook may have renamed it
                continue
            prefix, _, leaf = raw.rpartition(".")
            owner = _submodule(module, prefix)
            if leaf == _EXTRA and owner is not None:
                self._owners[normalise(raw, peft=names.peft)] = owner
            else:
                self._listed[normalise(raw, peft=names.peft)] = raw
        if self._listed:
            self._try_back({raw: state[raw] for raw in self._listed.values()})

    @property
    def keys(self) -> set[str]:
        return {*self._owners, *self._listed}

    def _try_back(self, listed: dict[str, Any]) -> None:
        """A hook or an override added these: would the module take them?"""
        try:
            refused = self._module.load_state_dict(listed, strict=False).unexpected_keys
        except Exception as e:
            raise UsageError(f"{min(listed)} is in the module's state_dict(), but its load_state_dict() fails on it alone: {e}") from e
        if refused:
            raise UsageError(
                f"{refused[0]} is in the module's state_dict(), and is neither a parameter nor a buffer, but its load_state_dict() does not know "
                "it: it would be lost on a resume. Handle it in _load_from_state_dict(), or use get_extra_state() and set_extra_state()"
            )

    def capture(self) -> tuple[dict[str, Any], list[Shard]]:
        """Return the state by key as a record holds it, and its large tensors."""
        if not self._owners and not self._listed:
            return {}, []
        carried, found = Carried(self._base), dict[str, Any]()
        for key, owner in self._owners.items():
            found[key] = carried.flatten(owner.get_extra_state(), key, refuse(f"the extra state of {type(owner).__name__}"))
        if self._listed:
            state = self._module.state_dict(keep_vars=True)
            for key, raw in self._listed.items():
                value = state[raw].detach() if isinstance(state.get(raw), torch.Tensor) else state.get(raw)
                found[key] = carried.flatten(value, key, refuse("the module's state_dict()"))
        return found, carried.shards

    def restore(self, values: dict[str, Any]) -> None:
        for key, owner in self._owners.items():
            if key in values:
                owner.set_extra_state(values[key])
        listed = {raw: values[key] for key, raw in self._listed.items() if key in values}
        if listed:
            self._module.load_state_dict(listed, strict=False)


class Unlisted:
    """State of a module that its own state dict does not list: what changes is reported once, since it is not saved.

    Buffers that are not persistent, and tensors and numbers in attributes that methods assign.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._first = dict(self._look())
        self._reported = False

    def _look(self) -> Iterator[tuple[str, Any]]:
        for prefix, owner in self._module.named_modules():
            for leaf in owner._non_persistent_buffers_set:
                buffer = owner._buffers.get(leaf)
                yield f"{prefix}.{leaf}".lstrip("."), buffer if buffer is None else (id(buffer), buffer._version)
            assigned = assigned_by_methods(type(owner)) if type(owner).__module__.partition(".")[0] not in ("torch", "deepspeed") else ()
            for leaf in assigned:
                value = vars(owner).get(leaf)
                if isinstance(value, torch.Tensor):
                    yield f"{prefix}.{leaf}".lstrip("."), (id(value), value._version)
                elif type(value) in (int, float) or (type(value) is list and value and isinstance(value[0], torch.Tensor)):
                    yield f"{prefix}.{leaf}".lstrip("."), value if type(value) is not list else (id(value), len(value))

    def report(self, listed: set[str]) -> None:
        """Report what has changed since this was made and is not ``listed``."""
        if self._reported:
            return
        changed = [name for name, value in self._look() if self._first.get(name) != value and name not in listed]
        if changed:
            self._reported = True
            more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
            logger.warning(
                "not saved, since the module's state_dict() does not list it, though training changes it: %s%s. Make it a persistent buffer, or "
                "part of get_extra_state(), if a resume shall bring it back", ", ".join(changed[:8]), more,
            )  # fmt: skip


def _may_list_more(module: nn.Module) -> bool:
    """Whether a module's state dict can have more than its parameters and buffers."""
    kind = type(module)
    return (
        kind.get_extra_state is not nn.Module.get_extra_state
        or kind._save_to_state_dict is not nn.Module._save_to_state_dict
        or kind.state_dict is not nn.Module.state_dict
        or bool(module._state_dict_hooks)
        or bool(module._state_dict_pre_hooks)
        or not {"state_dict", "_save_to_state_dict", "get_extra_state"}.isdisjoint(vars(module))
    )


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
