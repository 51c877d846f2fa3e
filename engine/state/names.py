"""Fully qualified names (FQNs), the same whatever wraps the module."""

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from torch import nn
from torch.distributed.tensor import DTensor

from engine.errors import LayoutError, UsageError
from engine.state.parts import Place, expert_place, local_experts, row_places

if TYPE_CHECKING:
    from engine.state.source import Piece

# Path components that wrappers add: torch.compile, activation checkpointing, FSDP1, PEFT's wrapped layer.
_WRAPPER_COMPONENTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"}


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

    ``places``: by FQN, the parameters that are boxes of a larger logical tensor.
    """

    def __init__(self, module: nn.Module) -> None:
        peft = hasattr(module, "peft_config") and hasattr(module, "base_model")
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self._of: dict[int, str] = {}
        _refuse_unknown(module)
        for raw, parameter in module.named_parameters(remove_duplicate=False):
            name = normalise(raw, peft=peft)
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
        self.buffer_aliases: dict[str, str] = {}
        seen: dict[int, str] = {}
        for prefix, owner in module.named_modules():
            for leaf, buffer in owner.named_buffers(recurse=False):
                if leaf in owner._non_persistent_buffers_set:
                    continue
                raw = f"{prefix}.{leaf}" if prefix else leaf
                name = normalise(raw, peft=peft)
                if id(buffer) in seen:
                    self.buffer_aliases[name] = seen[id(buffer)]
                else:
                    seen[id(buffer)] = name
                    self.buffers[name] = raw
        self._module = module
        self._look()

    def check(self) -> None:
        """Raises :class:`UsageError` where the module has other parameters than when this was made: what is gone would be saved, and what
        is new would not. FSDP2 puts others in their place itself, for a while: those are not asked for."""
        if self._held == [id(inner) for held in self._holders for inner in held.values()]:
            return
        present = {id(parameter): name for name, parameter in self._module.named_parameters()}
        sharded = [name for name, parameter in self.parameters.items() if isinstance(parameter, DTensor)]
        lost = [name for name, parameter in self.parameters.items() if id(parameter) not in present and name not in sharded]
        new = [] if sharded else [name for number, name in present.items() if number not in self._of]
        if odd := list(dict.fromkeys(lost + new)):
            raise UsageError(
                f"the module's parameters are others than when the Checkpointer was made: {', '.join(odd[:8])}. Change values in place, or make a "
                "new Checkpointer after replacing parameters, adding or removing them"
            )
        self._look()

    def _look(self) -> None:
        self._holders = [held for owner in self._module.modules() for held in (owner._parameters, owner._modules)]
        self._held = [id(inner) for held in self._holders for inner in held.values()]

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
            raise UsageError(f"{name} is cut by Megatron's tensor parallelism. This version cannot save it; DTensor placements it can")
