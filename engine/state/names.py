"""Fully qualified names (FQNs), the same whatever wraps the module."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from torch import nn

from engine.errors import LayoutError, UsageError
from engine.state.parts import Place, expert_place, local_experts, row_places

if TYPE_CHECKING:
    from engine.state.source import Piece

# Path components that wrappers add: torch.compile, activation checkpointing, FSDP1, PEFT's wrapped layer.
_FOR_COMPUTING = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WRAPPER_COMPONENTS = {*_FOR_COMPUTING, "base_layer"}


def unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, a DeepSpeed engine or torch.compile."""
    while True:
        inner: Any = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = module.module
        if inner is None:
            return module
        module = inner


def normalise(name: str, *, peft: bool = False) -> str:
    if peft:
        name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)


class Names:
    """The FQN of every parameter and persistent buffer of a module; tied ones have one name, and aliases.

    ``places``: by FQN, the parameters that are boxes of a larger logical tensor. ``raw``: every name that the module's own state dict
    has for them. ``empty``: persistent buffers that are None now, which a forward may fill, with their raw names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.peft = peft = hasattr(module, "peft_config") and hasattr(module, "base_model")
        self.raw: set[str] = set()
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self._of: dict[int, str] = {}
        _refuse_unknown(module)
        for raw, parameter in module.named_parameters(remove_duplicate=False):
            name = normalise(raw, peft=peft)
            self.raw.add(raw)
            if id(parameter) in self._of:
                self.aliases[name] = self._of[id(parameter)]
            elif name in self.parameters:
                raise LayoutError(f"two parameters are both called {name} once wrapper prefixes are removed ({raw} is one of them)")
            else:
                self.parameters[name] = parameter
                self._of[id(parameter)] = name
        self.places: dict[str, Place] = {}
        self._find_rows(module, peft)
        experts = local_experts(module)
        for name, parameter in self.parameters.items():
            if getattr(parameter, "allreduce", True):
                continue
            if id(parameter) not in experts:
                raise UsageError(f"{name} is an expert-parallel parameter outside DeepSpeed's MoE layer; how it is stacked is not known")
            self.places[name] = expert_place(name, parameter, experts[id(parameter)])
        self._module = module
        self._find_buffers()
        self._look()

    def _find_buffers(self) -> None:
        self._own_keys: dict[str, str] | None = None  # of ``raw``, which may grow here
        self.buffers, self.buffer_aliases, self.empty = {}, {}, dict[str, str]()
        seen: dict[int, str] = {}
        for prefix, owner in self._module.named_modules(remove_duplicate=False):
            for leaf, buffer in owner._buffers.items():
                if leaf in owner._non_persistent_buffers_set:
                    continue
                raw = f"{prefix}.{leaf}" if prefix else leaf
                name = normalise(raw, peft=self.peft)
                self.raw.add(raw)
                if buffer is None:
                    self.empty[name] = raw
                elif id(buffer) in seen:
                    self.buffer_aliases[name] = seen[id(buffer)]
                else:
                    seen[id(buffer)] = name
                    self.buffers[name] = raw

    def own_keys(self) -> dict[str, str]:
        """Return by FQN the keys of the module's own state dict that wrappers which are part of the model (PEFT's) name differently.
        Wrappers that are only there for computing do not count."""
        if self._own_keys is not None:
            return self._own_keys
        found = {}
        for raw in self.raw:
            key = ".".join(part for part in raw.split(".") if part not in _FOR_COMPUTING)
            if (name := normalise(raw, peft=self.peft)) != key:
                found[name] = key
        self._own_keys = dict(sorted(found.items()))
        return self._own_keys

    def buffer(self, name: str) -> torch.Tensor:
        return self._module.get_buffer(self.buffers[name])

    def loads_itself(self, name: str) -> bool:
        """Return whether a buffer's module has its own way to load: observers take buffers of any shape."""
        owner = self._module.get_submodule(self.buffers[name].rpartition(".")[0])
        kind = type(owner)  # those of torch.nn only translate older versions
        return kind._load_from_state_dict is not nn.Module._load_from_state_dict and not kind.__module__.startswith("torch.nn.")

    def set_buffer(self, name: str, value: torch.Tensor | None) -> None:
        """Put a tensor in the place of a buffer, or None; under all names that share it."""
        known = {**self.buffers, **self.empty}
        old = self.buffer(name) if name in self.buffers else None
        raws = [known[name]]
        if old is not None:
            raws += [
                f"{prefix}.{leaf}" if prefix else leaf
                for prefix, owner in self._module.named_modules()
                for leaf, b in owner._buffers.items()
                if b is old
            ]
        for raw in raws:
            prefix, _, leaf = raw.rpartition(".")
            self._module.get_submodule(prefix)._buffers[leaf] = value
        self._find_buffers()
        self._look()

    def check(self, reshard: Callable[[], None] = lambda: None) -> bool:
        """Return whether modules or buffers have been added, removed or filled since the last look.

        Raises :class:`UsageError` where the module has other parameters than when this was made: what is gone would be saved, and what
        is new would not. FSDP2 puts others in their place itself, for a while: ``reshard`` brings its own back.
        """
        changed = self._shape_of_buffers() != self._buffer_shape
        if self._held == [id(inner) for held in self._holders for inner in held.values()]:
            if changed:
                self._find_buffers()
                self._look()
            return changed
        reshard()
        present = {id(parameter): name for name, parameter in self._module.named_parameters()}
        lost = [name for name, parameter in self.parameters.items() if id(parameter) not in present]
        new = [name for number, name in present.items() if number not in self._of]
        if odd := list(dict.fromkeys(lost + new)):
            raise UsageError(
                f"the module's parameters changed since the Checkpointer was made: {', '.join(odd[:8])}. Change values in place, or make a "
                "new Checkpointer after replacing parameters (load_state_dict(assign=True) does), adding or removing them"
            )
        self._find_buffers()
        self._look()
        return True

    def _look(self) -> None:
        modules = list(self._module.modules())
        self._holders = [held for owner in modules for held in (owner._parameters, owner._modules)]
        self._held = [id(inner) for held in self._holders for inner in held.values()]
        self._buffers_of = [owner._buffers for owner in modules]
        self._buffer_shape = self._shape_of_buffers()

    def _shape_of_buffers(self) -> list[bool]:
        """How many buffers each module has, and which are None: what changes where one is added or filled."""
        return [value is None for buffers in self._buffers_of if buffers for value in (*buffers.values(), None)]

    def _find_rows(self, module: nn.Module, peft: bool) -> None:
        """Rows that a module declares, where they are tied to another module's rows as an alias of the whole."""
        for raw, owner in module.named_modules():
            prefix = normalise(f"{raw}.", peft=peft) if raw else ""
            own = {name: parameter for name, parameter in owner.named_parameters(recurse=False)}
            for name, place in row_places(owner, prefix, own).items():
                first = self.aliases.pop(f"{prefix}{name}", None)
                if first is None:
                    self.places[f"{prefix}{name}"] = place
                elif first in self.places and self.places[first].offsets == place.offsets:
                    self.aliases[place.name] = self.places[first].name
                else:
                    raise LayoutError(f"{prefix}{name} is tied to {first}, which is not the same rows of a weight; declare both alike")
        taken = sorted({place.name for place in self.places.values()} & self.parameters.keys())
        if taken:
            raise LayoutError(f"{taken[0]} is declared to consist of other parameters, but there is a parameter of that name")

    def placed(self, piece: "Piece") -> "Piece":
        """A parameter that is a box of a larger tensor under that tensor's name; any other as it is."""
        place = self.places.get(piece.name)
        return replace(piece, name=place.name, place=place) if place else piece

    def of(self, parameter: nn.Parameter) -> str:
        """Raises :class:`LayoutError` for a parameter that the module does not have."""
        if id(parameter) not in self._of:
            raise LayoutError(f"a parameter of shape {tuple(parameter.shape)} is in the optimizer but not in the module; give both of the same model")
        return self._of[id(parameter)]


def _refuse_unknown(module: nn.Module) -> None:
    """State whose pieces look whole on each rank but are not: saving it as if would lose all ranks' but one."""
    if any(type(inner).__name__ == "FullyShardedDataParallel" for inner in module.modules()):
        raise UsageError("FSDP1 (FullyShardedDataParallel) is not supported; shard with torch.distributed.fsdp.fully_shard")
    for name, parameter in module.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            raise UsageError(
                f"{name} is cut by tensor parallelism that is not DTensor's (DeepSpeed AutoTP's, or Megatron's), which this version cannot save. "
                "Use torch.distributed.tensor.parallel.parallelize_module"
            )
