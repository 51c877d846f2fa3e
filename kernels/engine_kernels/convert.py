"""Models that exist: their embeddings and heads become partly frozen in place."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from engine_kernels.modules import PartiallyFrozenEmbedding, PartiallyFrozenLinear

_replaced = WeakIdKeyDictionary()  # a parameter that convert() has replaced -> its name
_sound: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


def convert(model: nn.Module, bases: Mapping[str, int]) -> nn.Module:
    """Freeze rows [0, base) of embeddings and linear layers, in place; returns ``model``.

    Args:
        model: not yet given to DeepSpeed or ``fully_shard``, and to no optimizer: that would hold the old parameters.
        bases: by module name, ``{"text_embedding": 12000}``: a full path, or its end where only one module has it. What is tied to a
            module's weight becomes partly frozen with it, and stays tied; it may also be named, with the same base.

    The trainable rows are named ``<module>.trainable``, the frozen ones ``<module>.frozen``; state dicts have ``<module>.weight`` as before.

    Raises ValueError for a name that no module or several have, a base outside [0, V], one that differs between tied modules, a module
    that is already converted, of another class, with hooks, or with an option that is not supported, and for a model that is sharded.
    Stepping an optimizer that was built before raises RuntimeError.
    """
    chosen: dict[str, int] = {}
    for name, base in bases.items():
        chosen[_find(model, name)] = base
    wanted = _with_tied(model, chosen)
    for name, base in wanted.items():
        _check(name, model.get_submodule(name), base)
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, base in wanted.items():
        old: Any = model.get_submodule(name)
        new = _made(old, base)
        for whole, names in new.row_parts.items():
            parameter = getattr(old, whole)
            parts = made.setdefault(id(parameter), (getattr(new, names[0]), getattr(new, names[1])))
            for part, part_name in zip(parts, names, strict=True):
                part.requires_grad_(part.requires_grad and parameter.requires_grad)
                setattr(new, part_name, part)
            _replaced[parameter] = f"{name}.{whole}"
        new.train(old.training)
        for place in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    _sound.clear()
    return model


def _find(model: nn.Module, name: str) -> str:
    paths = [path for path, _ in model.named_modules()]
    if name in paths:
        return name
    found = [path for path in paths if path.endswith(f".{name}")]
    if len(found) != 1:
        what = f"{len(found)} modules end in it: {', '.join(found[:8])}" if found else "no module has it"
        raise ValueError(f"{name!r} is not the name of a module: {what}")
    return found[0]


def _with_tied(model: nn.Module, chosen: dict[str, int]) -> dict[str, int]:
    """``chosen`` and all modules that share a weight with one of them."""
    wanted = dict(chosen)
    for name, base in chosen.items():
        weight = getattr(model.get_submodule(name), "weight", None)
        for other, module in model.named_modules():
            if weight is not None and other != name and getattr(module, "_parameters", {}).get("weight") is weight:
                if chosen.get(other, base) != base:
                    raise ValueError(f"{name} and {other} share a weight, but are to have {base} and {chosen[other]} frozen rows")
                wanted[other] = base
    return wanted


def _check(name: str, module: nn.Module, base: int) -> None:
    if isinstance(module, PartiallyFrozenEmbedding | PartiallyFrozenLinear):
        raise ValueError(f"{name} is already partly frozen, with base {module.base}")
    if type(module) not in (nn.Embedding, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}; only nn.Embedding and nn.Linear can be converted")
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        raise ValueError(f"{name} is already sharded; convert the model before fully_shard and deepspeed.initialize")
    if not isinstance(base, int) or not 0 <= base <= weight.shape[0]:
        raise ValueError(f"{name}: base is {base}; it has {weight.shape[0]} rows, so base must be 0 to {weight.shape[0]}")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks) or getattr(weight, "_backward_hooks", None):
        raise ValueError(f"{name} has hooks, which would be lost; register them after the conversion")
    options = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    odd = [option for option, usual in options.items() if isinstance(module, nn.Embedding) and getattr(module, option) != usual]
    if odd:
        raise ValueError(f"{name} has {odd[0]}={getattr(module, odd[0])}, which a partly frozen embedding does not support")


def _made(old: nn.Module, base: int) -> PartiallyFrozenEmbedding | PartiallyFrozenLinear:
    if isinstance(old, nn.Embedding):
        return PartiallyFrozenEmbedding(old.weight, base, old.padding_idx)
    assert isinstance(old, nn.Linear)
    return PartiallyFrozenLinear(old.weight, base, old.bias)


def _refuse_stale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _sound:
        return
    stale = [_replaced[p] for group in optimizer.param_groups for p in group["params"] if p in _replaced]
    if stale:
        raise RuntimeError(f"the optimizer was built before convert(): it holds {stale[0]}, which the model no longer has. Build it anew")
    _sound.add(optimizer)


register_optimizer_step_pre_hook(_refuse_stale)
