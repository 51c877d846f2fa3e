"""Everything that trains with state of its own: optimizers, schedulers, scalers, samplers, averages, metrics and modules of PyTorch and the
packages around it, found by looking into the packages.

Importing this imports all packages that are there; :data:`ABSENT` says which are not.
"""

import contextlib
import copy
import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # some optimizers compile their step, for longer than all others train
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import Optimizer

import engine

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

ABSENT: dict[str, str] = {}
"""Families that cannot be tried here, and why."""

BATCH = 8


@dataclass
class Rig:
    """One subject, built. ``train(i)`` is step ``i`` and returns what it computed. ``members`` are as a Checkpointer takes them.
    ``pause``: what the subject's documentation asks for before a save. ``lazy``: members whose state is only settled by the next step."""

    module: nn.Module
    optimizer: Any
    train: Callable[[int], Any]
    scheduler: Any = None
    members: dict[str, Any] = field(default_factory=dict)
    pause: Callable[[], None] = lambda: None
    lazy: frozenset[str] = frozenset()

    @property
    def model(self) -> tuple:
        return (self.module, self.optimizer) if self.scheduler is None else (self.module, self.optimizer, self.scheduler)

    def parts(self) -> dict[str, Any]:
        """What has a ``state_dict``."""
        found = {"module": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        found |= {name: member.target if isinstance(member, engine.PerRank) else member for name, member in self.members.items()}
        return {name: part for name, part in found.items() if part is not None}


Subjects = dict[str, Callable[[], Rig]]
"""What builds each subject, by ``family/name``."""


# ---------------------------------------------------------------------------------------------------------------------------- models


class Tiny(nn.Module):
    """A convolution, matrices and vectors. ``hidden`` makes the matrices larger; ``between`` is a module of the subject's."""

    def __init__(self, hidden: int = 16, between: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.up = nn.Linear(24, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.between = between or nn.Identity()
        self.down = nn.Linear(hidden, 3, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        h_BH = self.between(self.norm(F.gelu(self.up(self.conv(x_BD.unsqueeze(1)).flatten(1)))))
        return F.mse_loss(self.down(h_BH), x_BD[:, :3].tanh())


class Matrices(nn.Module):
    """For optimizers of matrices only. ``hidden`` as above."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, hidden, bias=False), nn.Linear(hidden, 12, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x_BD))), x_BD.tanh())


class Looked(nn.Module):
    """Rows of a table, with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 4, sparse=True)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.table(x_BD.abs().mul(3).long() % 13).pow(2).mean()


def data(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(1000 + step))


# ------------------------------------------------------------------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class How:
    """How an optimizer is made and stepped. ``params`` names one of :data:`_PARAMS`, ``style`` one of :data:`_STYLES`; ``make`` builds it
    from the module where ``kind(params, **kwargs)`` does not."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    params: str = "groups"
    style: str = "plain"
    module: Callable[[], nn.Module] = Tiny
    make: Callable[[nn.Module], Any] | None = None


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices, vectors = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}] if vectors else [{"params": matrices}]


def _muon_groups(module: nn.Module) -> list[dict[str, Any]]:
    inner = [p for p in module.parameters() if p.ndim == 2]
    return [{"params": inner, "use_muon": True}, {"params": [p for p in module.parameters() if p.ndim != 2], "use_muon": False}]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim == 2]


_PARAMS: dict[str, Callable[[nn.Module], Any]] = {
    "groups": _groups,
    "flat": lambda module: list(module.parameters()),
    "matrices": _matrices,
    "muon": _muon_groups,
    "model": lambda module: module,
}


def _closure(module: nn.Module, optimizer: Any, step: int, create_graph: bool = False) -> Callable[[], torch.Tensor]:
    @torch.enable_grad()
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(data(step))
        loss.backward(create_graph=create_graph)
        return loss

    return closure


def _plain(module: nn.Module, optimizer: Any, step: int, create_graph: bool = False) -> float:
    loss = _closure(module, optimizer, step, create_graph)()
    optimizer.step()
    return loss.item()


def _with_closure(module: nn.Module, optimizer: Any, step: int) -> float:
    return float(optimizer.step(_closure(module, optimizer, step)))


def _backward_then_closure(module: nn.Module, optimizer: Any, step: int) -> float:
    closure = _closure(module, optimizer, step)
    loss = closure().item()
    optimizer.step(closure)
    return loss


def _fused_backward(module: nn.Module, optimizer: Any, step: int) -> float:
    loss = module(data(step))
    optimizer.fused_backward(loss, lr=0.01)
    return loss.item()


def _two_losses(module: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    losses = [module(data(step)), module(data(step + 100))]
    optimizer.pc_backward(losses)
    optimizer.step()
    return losses[0].item()


def _own_backward(module: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    loss = module(data(step))
    optimizer.backward(loss)
    optimizer.step()
    return loss.item()


def _gsam(module: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.set_closure(F.mse_loss, data(step), torch.zeros(()))
    _, loss = optimizer.step()
    return float(loss)


def _numbered(module: nn.Module, optimizer: Any, step: int) -> float:
    loss = _closure(module, optimizer, step)()
    optimizer.step(step_id=step + 1)
    return loss.item()


_STYLES: dict[str, Callable[[nn.Module, Any, int], float]] = {
    "plain": _plain,
    "graph": partial(_plain, create_graph=True),
    "closure": _with_closure,
    "backward, closure": _backward_then_closure,
    "fused": _fused_backward,
    "losses": _two_losses,
    "own backward": _own_backward,
    "gsam": _gsam,
    "numbered": _numbered,
}


def _optimizer_rig(kind: Callable[..., Any], how: How) -> Rig:
    module = how.module()
    optimizer = how.make(module) if how.make else kind(_PARAMS[how.params](module), **how.kwargs)
    enter, leave = getattr(optimizer, "train", None), getattr(optimizer, "eval", None)

    def train(step: int) -> float:
        if enter and leave:
            enter()
        return _STYLES[how.style](module, optimizer, step)

    return Rig(module, optimizer, train, pause=leave if enter and leave else lambda: None)


def _sgd(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(_groups(module), lr=0.1, momentum=0.9)


def _adamw(module: nn.Module) -> Optimizer:
    return torch.optim.AdamW(_groups(module), lr=0.01)


_AROUND = ("Lookahead", "OrthoGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC", "PCGrad", "Magma")
_ASCENT = ("SAM", "LookSAM", "FriendlySAM")


def _around(name: str) -> Callable[[nn.Module], Any]:
    def make(module: nn.Module) -> Any:
        pytorch_optimizer = importlib.import_module("pytorch_optimizer")

        kwargs = {"k": 2} if name == "Lookahead" else {}
        base = torch.optim.AdamW(module.parameters()) if name == "SafeFP16Optimizer" else _adamw(module)
        return getattr(pytorch_optimizer, name)(base, **kwargs)

    return make


def _wsam(module: nn.Module) -> Any:
    pytorch_optimizer = importlib.import_module("pytorch_optimizer")

    return pytorch_optimizer.WSAM(module, _groups(module), torch.optim.AdamW, lr=0.01)


def _make_gsam(module: nn.Module) -> Any:
    pytorch_optimizer = importlib.import_module("pytorch_optimizer")

    base = _adamw(module)
    rate = torch.optim.lr_scheduler.StepLR(base, 2)
    rho = pytorch_optimizer.ProportionScheduler(rate, max_lr=0.01)
    return pytorch_optimizer.GSAM(_groups(module), base, module, rho)


def _join_a_group() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _of_pytorch_optimizer_in_a_group(name: str, params: str, module: nn.Module) -> Any:
    _join_a_group()
    return getattr(importlib.import_module("pytorch_optimizer"), name)(_PARAMS[params](module))


def _zero_redundancy(module: nn.Module) -> Any:
    _join_a_group()
    return ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=0.01)


def _in_a_group(name: str, params: str, module: nn.Module) -> Any:
    import deepspeed

    _join_a_group()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    package = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    return getattr(package, name)(_PARAMS[params](module))


_LARGE_WITH_MOMENTUM = How({"lr": 0.1, "momentum": 0.9}, module=partial(Tiny, 512))

HOW: dict[str, How] = {
    "torch.optim/LBFGS": How({"lr": 0.1, "max_iter": 4}, "flat", "closure"),
    "torch.optim/Muon": How({}, "matrices"),
    "torch.optim/SparseAdam": How({"lr": 0.01}, "flat", module=Looked),
    "torch.optim/SGD": How({"lr": 0.1, "momentum": 0.9}),
    "transformers/Adafactor": How({"lr": None}),
    "torch.optim/ZeroRedundancyOptimizer": How(make=_zero_redundancy),
    "deepspeed/Muon": How(make=partial(_in_a_group, "Muon", "matrices")),
    "deepspeed/SingleDeviceMuon": How({}, "matrices"),
    "deepspeed/MuonWithAuxAdam": How(make=partial(_in_a_group, "MuonWithAuxAdam", "muon")),
    "deepspeed/SingleDeviceMuonWithAuxAdam": How({}, "muon"),
    "deepspeed/ZenFlowCPUAdam": How({}, style="numbered"),
    "timm/Adahessian": How({}, style="graph"),
    "timm/SGDP": How({"lr": 0.1, "momentum": 0.9}),
    "timm/Lookahead": How(make=lambda module: sys.modules["timm.optim.lookahead"].Lookahead(_adamw(module), k=2)),
    "schedulefree/ScheduleFreeWrapper": How(make=lambda module: importlib.import_module("schedulefree").ScheduleFreeWrapper(_sgd(module))),
    "schedulefree/ScheduleFreeWrapperReference": How(
        make=lambda module: importlib.import_module("schedulefree").ScheduleFreeWrapperReference(_sgd(module))
    ),
    **{
        f"schedulefree/{name}": How({}, style="closure")
        for name in ("AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure")
    },
    **{f"pytorch_optimizer/{name}": How(make=_around(name)) for name in _AROUND},
    **{f"pytorch_optimizer/{name}": How({"base_optimizer": torch.optim.AdamW}, style="backward, closure") for name in _ASCENT},
    "pytorch_optimizer/PCGrad": How(make=_around("PCGrad"), style="losses"),
    "pytorch_optimizer/SafeFP16Optimizer": How(make=_around("SafeFP16Optimizer"), style="own backward"),
    "pytorch_optimizer/WSAM": How(make=_wsam, style="backward, closure"),
    "pytorch_optimizer/GSAM": How(make=_make_gsam, style="gsam"),
    "pytorch_optimizer/BSAM": How({"num_data": 64}, style="backward, closure"),
    "pytorch_optimizer/AdaLOMO": How({}, "model", "fused", Matrices),
    "pytorch_optimizer/LoRARite": How({}, "flat", module=Matrices),
    "pytorch_optimizer/DeMo": How(make=partial(_of_pytorch_optimizer_in_a_group, "DeMo", "matrices"), module=Matrices),
    "pytorch_optimizer/DistributedMuon": How(make=partial(_of_pytorch_optimizer_in_a_group, "DistributedMuon", "muon")),
    "pytorch_optimizer/SpectralSphere": How({}, "matrices"),
    **{f"pytorch_optimizer/{name}": How({}, "muon") for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
    **{f"bitsandbytes/{name}{bits}": _LARGE_WITH_MOMENTUM for name in ("LARS", "SGD") for bits in ("", "8bit", "32bit")},
    "bitsandbytes/PytorchLARS": _LARGE_WITH_MOMENTUM,
    "bitsandbytes/AdEMAMix32bit": How(module=partial(Matrices, 512)),
    "bitsandbytes/PagedAdEMAMix32bit": How(module=partial(Matrices, 512)),
    "pytorch_optimizer/LOMO": How({}, "model", "fused"),
    "pytorch_optimizer/AdamMini": How({}, "model"),
    "pytorch_optimizer/Ranger21": How({"num_iterations": 50}),
    "pytorch_optimizer/AliG": How({}, style="closure"),
    "pytorch_optimizer/AdaHessian": How({}, style="graph"),
    "pytorch_optimizer/SophiaH": How({}, style="graph"),
}
"""For those that need more than ``kind(groups)``."""

_BITSANDBYTES = How(module=partial(Tiny, 512))  # eight bits are for tensors of 4096 elements and more
_NEED_RATE = How({"lr": 0.01})


def _classes(module: Any, base: type) -> Iterator[tuple[str, type]]:
    for name, kind in inspect.getmembers(module, inspect.isclass):
        if issubclass(kind, base) and kind is not base and not name.startswith("_"):
            yield name, kind


def _submodules(package: str) -> Iterator[Any]:
    """All modules of a package that import here."""
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        with contextlib.suppress(Exception):
            yield importlib.import_module(found.name)


def _required(kind: type) -> set[str]:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _torch_optimizers() -> Iterator[tuple[str, type]]:
    yield from _classes(torch.optim, Optimizer)
    yield "ZeroRedundancyOptimizer", ZeroRedundancyOptimizer


def _transformers_optimizers() -> Iterator[tuple[str, type]]:
    yield from _classes(importlib.import_module("transformers.optimization"), Optimizer)


def _timm_optimizers() -> Iterator[tuple[str, type]]:
    for module in _submodules("timm.optim"):
        yield from ((name, kind) for name, kind in _classes(module, Optimizer) if kind.__module__ == module.__name__)


def _bitsandbytes_optimizers() -> Iterator[tuple[str, type]]:
    yield from _classes(importlib.import_module("bitsandbytes.optim"), Optimizer)


def _schedulefree_optimizers() -> Iterator[tuple[str, type]]:
    yield from _classes(importlib.import_module("schedulefree"), object)


def _lion_optimizers() -> Iterator[tuple[str, type]]:
    yield from _classes(importlib.import_module("lion_pytorch"), Optimizer)


def _pytorch_optimizer_optimizers() -> Iterator[tuple[str, type]]:
    package = importlib.import_module("pytorch_optimizer")
    for name in package.get_supported_optimizers():
        kind = package.load_optimizer(name)
        yield kind.__name__, kind
    for name, kind in inspect.getmembers(package, inspect.isclass):
        if hasattr(kind, "step") and hasattr(kind, "zero_grad"):
            yield name, kind


def _deepspeed_optimizers() -> Iterator[tuple[str, type]]:
    for module in ("adam", "adagrad", "lamb", "lion"):
        yield from _classes(importlib.import_module(f"deepspeed.ops.{module}"), Optimizer)
    yield from _classes(importlib.import_module("deepspeed.runtime.zero.muon.original_muon"), Optimizer)
    with contextlib.suppress(ImportError):
        for module in _submodules("deepspeed.runtime.fp16.onebit"):
            yield from _classes(module, Optimizer)


_OPTIMIZERS: dict[str, Callable[[], Iterator[tuple[str, type]]]] = {
    "torch.optim": _torch_optimizers,
    "transformers": _transformers_optimizers,
    "timm": _timm_optimizers,
    "bitsandbytes": _bitsandbytes_optimizers,
    "schedulefree": _schedulefree_optimizers,
    "lion_pytorch": _lion_optimizers,
    "pytorch_optimizer": _pytorch_optimizer_optimizers,
    "deepspeed": _deepspeed_optimizers,
}


def _optimizers(family: str) -> Subjects:
    found: Subjects = {}
    for name, kind in _OPTIMIZERS[family]():
        if family != "torch.optim" and kind.__module__.startswith("torch.optim"):
            continue  # handed on
        label = f"{family}/{name}"
        standard = _BITSANDBYTES if family == "bitsandbytes" else How()
        if label not in HOW and "lr" in _required(kind):
            standard = How(_NEED_RATE.kwargs, module=standard.module)
        found.setdefault(label, partial(_optimizer_rig, kind, HOW.get(label, standard)))
    return found


# ------------------------------------------------------------------------------------------------------------------------- schedulers


def _rate(step: int) -> float:
    return 0.9**step


_SCHEDULES: dict[str, Mapping[str, Any]] = {
    "ChainedScheduler": {},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": _rate},
    "MultiStepLR": {"milestones": [2, 4]},
    "MultiplicativeLR": {"lr_lambda": _rate},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 10.0, "cooldown": 1},
    "StepLR": {"step_size": 2},
    "SWALR": {"swa_lr": 0.05, "anneal_epochs": 4},
    "GreedyLR": {"patience": 1, "smooth": True, "window_size": 4},
    "AdafactorSchedule": {},
    # DeepSpeed's
    "LRRangeTest": {"lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 2, "decay_lr_rate": 0.1, "decay_step_size": 1},
    "WarmupLR": {"warmup_max_lr": 0.1, "warmup_num_steps": 5},
    "WarmupDecayLR": {"total_num_steps": 8, "warmup_max_lr": 0.1, "warmup_num_steps": 4},
    "WarmupCosineLR": {"total_num_steps": 8, "warmup_num_steps": 4},
    # timm's
    "CosineLRScheduler": {"t_initial": 4, "warmup_t": 2, "cycle_limit": 2, "noise_range_t": (0, 9)},
    "MultiStepLRScheduler": {"decay_t": [2, 4], "decay_rate": 0.5},
    "PlateauLRScheduler": {"patience_t": 0, "threshold": 10.0, "mode": "min", "noise_range_t": 1},
    "PolyLRScheduler": {"t_initial": 4, "cycle_limit": 2},
    "StepLRScheduler": {"decay_t": 2, "decay_rate": 0.5},
    "TanhLRScheduler": {"t_initial": 4, "cycle_limit": 2},
    "WSDLRScheduler": {"t_initial": 6, "decay_t": 4, "warmup_t": 2},
    # pytorch_optimizer's
    "CosineScheduler": {"t_max": 8, "max_lr": 0.1, "warmup_steps": 2},
    "LinearScheduler": {"t_max": 8, "max_lr": 0.1, "warmup_steps": 2},
    "PolyScheduler": {"t_max": 8, "max_lr": 0.1, "warmup_steps": 2},
    "CosineAnnealingWarmupRestarts": {"first_cycle_steps": 4, "max_lr": 0.1, "warmup_steps": 1},
    "REXScheduler": {"total_steps": 8, "max_lr": 0.1},
    "get_chebyshev_schedule": {"num_epochs": 4},
    "get_wsd_schedule": {"num_warmup_steps": 2, "num_stable_steps": 2, "num_decay_steps": 3},
}


def _scheduler_rig(make: Callable[[Optimizer], Any], how_to_step: Callable[[Any, int, float], Any]) -> Rig:
    module = Tiny()
    optimizer = _sgd(module)
    scheduler = make(optimizer)

    def train(step: int) -> float:
        loss = _plain(module, optimizer, step)
        how_to_step(scheduler, step, loss)
        return loss

    return Rig(module, optimizer, train, scheduler)


def _step_simply(scheduler: Any, step: int, loss: float) -> None:
    scheduler.step()


def _step_by_loss(scheduler: Any, step: int, loss: float) -> None:
    scheduler.step(loss)


def _step_by_epoch(scheduler: Any, step: int, loss: float) -> None:
    scheduler.step(step + 1, loss)


def _takes_loss(kind: Any) -> bool:
    return isinstance(kind, type) and "metrics" in inspect.signature(kind.step).parameters  # type: ignore[attr-defined]


def _made(kind: Callable[..., Any], optimizer: Optimizer) -> Any:
    name = kind.__name__
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(optimizer, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)])
    if name == "SequentialLR":
        return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [2])
    if name == "ProportionScheduler":
        return kind(lr_scheduler.StepLR(optimizer, 2), max_lr=0.1)
    return kind(optimizer, **_SCHEDULES.get(name, {}))


def _of_kinds(family: str, kinds: Mapping[str, Any], step: Callable[[Any, int, float], Any] = _step_simply) -> Subjects:
    return {
        f"{family}/{name}": partial(_scheduler_rig, partial(_made, kind), _step_by_loss if _takes_loss(kind) else step)
        for name, kind in kinds.items()
    }


def _nested(optimizer: Optimizer) -> Any:
    inner = lr_scheduler.SequentialLR(optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.CosineAnnealingLR(optimizer, 5)], [2])
    return lr_scheduler.ChainedScheduler([inner, lr_scheduler.LambdaLR(optimizer, [_rate, _rate])])


def _torch_schedulers() -> Subjects:
    kinds = {name: kind for name, kind in _classes(lr_scheduler, lr_scheduler.LRScheduler)} | {"SWALR": swa_utils.SWALR}
    found = _of_kinds("torch schedulers", kinds)
    found["torch schedulers/Chained(Sequential)"] = partial(_scheduler_rig, _nested, _step_simply)
    return found


def _hugging_face(name: str, optimizer: Optimizer) -> Any:
    from transformers import get_scheduler

    specific: dict[str, Any] = {}
    if name == "warmup_stable_decay":
        specific = {"num_decay_steps": 2}
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        specific = {"min_lr": 0.001}
    if name == "reduce_lr_on_plateau":
        specific = {"patience": 0, "threshold": 10.0}
    if name == "greedy":
        specific = dict(_SCHEDULES["GreedyLR"])
    return get_scheduler(name, optimizer, 2, 8, scheduler_specific_kwargs=specific)


def _transformers_schedulers() -> Subjects:
    from transformers import SchedulerType
    from transformers.optimization import AdafactorSchedule

    found: Subjects = {}
    for kind in SchedulerType:
        step = _step_by_loss if kind.value in ("reduce_lr_on_plateau", "greedy") else _step_simply
        found[f"transformers schedulers/{kind.value}"] = partial(_scheduler_rig, partial(_hugging_face, kind.value), step)

    def with_adafactor() -> Rig:
        from transformers.optimization import Adafactor

        rig = _optimizer_rig(Adafactor, How({"lr": None}))
        optimizer, scheduler = rig.optimizer, AdafactorSchedule(rig.optimizer)

        def train(step: int) -> float:
            loss = _plain(rig.module, optimizer, step)
            scheduler.step()
            return loss

        return Rig(rig.module, optimizer, train, scheduler)

    found["transformers schedulers/AdafactorSchedule"] = with_adafactor
    return found


def _timm_schedulers() -> Subjects:
    base = importlib.import_module("timm.scheduler.scheduler").Scheduler
    return _of_kinds("timm schedulers", dict(_classes(importlib.import_module("timm.scheduler"), base)), _step_by_epoch)


def _deepspeed_schedulers() -> Subjects:
    module = importlib.import_module("deepspeed.runtime.lr_schedules")
    kinds = {name: kind for name, kind in _classes(module, object) if kind.__module__ == module.__name__ and hasattr(kind, "step")}
    return _of_kinds("deepspeed schedulers", kinds)


def _pytorch_optimizer_schedulers() -> Subjects:
    package = importlib.import_module("pytorch_optimizer")
    kinds = {}
    for name in package.get_supported_lr_schedulers():
        kind = package.load_lr_scheduler(name)
        if not kind.__module__.startswith("torch."):
            kinds[kind.__name__] = kind
    return _of_kinds("pytorch_optimizer schedulers", kinds)


# ---------------------------------------------------------------------------------------------------- scalers, samplers, averages, metrics


def _beside(module: nn.Module, after: Callable[[int], Any], **members: Any) -> Rig:
    """A model trained by SGD, and members; ``after(step)`` follows each step, and what it returns is compared too."""
    optimizer = _sgd(module)

    def train(step: int) -> Any:
        return [_plain(module, optimizer, step), after(step)]

    return Rig(module, optimizer, train, members=members)


def _scaler_rig() -> Rig:
    module, scaler = Tiny(), torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizer = _sgd(module)

    def train(step: int) -> Any:
        optimizer.zero_grad()
        loss = module(data(step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [loss.item(), scaler.get_scale()]

    return Rig(module, optimizer, train, members={"scaler": scaler})


def _loader_rig(make: Callable[[], Any], member: Callable[[Any], Any] = lambda loader: loader, lazy: bool = False) -> Rig:
    """What a loader or sampler gives is trained on, and returned."""
    module, loader = Tiny(), make()
    optimizer, iterator = _sgd(module), iter(())

    def train(step: int) -> Any:
        nonlocal iterator
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(loader)
            batch = next(iterator)
        indices = [int(i) for i in batch]
        return [_plain(module, optimizer, indices[0]), indices]

    return Rig(module, optimizer, train, members={"loader": member(loader)}, lazy=frozenset({"loader"} if lazy else ()))


def _stateful_loader(**kwargs: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(range(40), batch_size=BATCH, **kwargs)  # type: ignore[arg-type] - a sequence


def _member_subjects() -> Subjects:
    found: Subjects = {
        "scalers/torch.amp.GradScaler": _scaler_rig,
        "samplers/engine.ElasticSampler": partial(_loader_rig, lambda: engine.ElasticSampler(range(40), BATCH, seed=3)),
    }
    if find_spec("torchdata"):
        for name, kwargs in (("StatefulDataLoader", {}), ("StatefulDataLoader shuffled", {"shuffle": True})):
            found[f"samplers/{name}"] = partial(_loader_rig, partial(_stateful_loader, **kwargs), lazy=True)
            found[f"samplers/PerRank({name})"] = partial(_loader_rig, partial(_stateful_loader, **kwargs), engine.PerRank, lazy=True)
    else:
        ABSENT["samplers of torchdata"] = "torchdata is not installed"
    return found


def _average_rig(make: Callable[[nn.Module], Any], update: Callable[[Any, nn.Module, int], Any]) -> Rig:
    module = Tiny(between=nn.BatchNorm1d(16))
    average = make(module)
    return _beside(module, lambda step: update(average, module, step), average=average)


def _averages() -> Subjects:
    def update(average: Any, module: nn.Module, step: int) -> None:
        average.update_parameters(module)

    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    makes: dict[str, Callable[[nn.Module], Any]] = {
        "AveragedModel": swa_utils.AveragedModel,
        "AveragedModel(ema, use_buffers)": lambda module: swa_utils.AveragedModel(module, multi_avg_fn=ema, use_buffers=True),
    }
    return {f"averages/torch {name}": partial(_average_rig, make, update) for name, make in makes.items()}


def _timm_averages() -> Subjects:
    module = importlib.import_module("timm.utils.model_ema")

    def update(average: Any, module: nn.Module, step: int) -> None:
        average.update(module, **({"step": step} if "step" in inspect.signature(average.update).parameters else {}))

    def make(kind: Any, model: nn.Module) -> Any:
        return kind(model, decay=0.9)

    kinds = {name: kind for name, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__}
    return {f"averages/timm {name}": partial(_average_rig, partial(make, kind), update) for name, kind in kinds.items()}


def _metric_arguments() -> Iterator[dict[str, Any]]:
    torchmetrics = importlib.import_module("torchmetrics")

    squared = torchmetrics.MeanSquaredError
    yield {}
    yield {"task": "multiclass", "num_classes": 3}
    yield {"task": "binary"}
    yield {"num_classes": 3}
    yield {"task": "multiclass", "num_classes": 3, "beta": 0.5}
    yield {"task": "binary", "min_recall": 0.5}
    yield {"task": "binary", "min_precision": 0.5}
    yield {"task": "binary", "min_sensitivity": 0.5}
    yield {"task": "binary", "min_specificity": 0.5}
    yield {"task": "multilabel", "num_labels": 3}
    yield {"num_outputs": 1}
    yield {"p": 3}
    yield {"threshold": 0.5}
    yield {"window": 2}
    yield {"data_range": 1.0}
    yield {"things": {0, 1}, "stuffs": {2}}
    yield {"base_metric": squared()}
    yield {"base_metric": squared(), "num_outputs": 3}
    yield {"metric": torchmetrics.Accuracy("multiclass", num_classes=3, average="none")}
    yield {"task_metrics": {"a": squared(), "b": squared()}}
    yield {"metric_func": torchmetrics.functional.signal_noise_ratio}


def _metric_inputs(step: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(step)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    yield (rand(8),), {}
    yield (rand(8), rand(8)), {}
    yield (rand(8, 3).softmax(-1), ints(3, 8)), {}
    yield (rand(8), ints(2, 8)), {}
    yield (ints(3, 8), ints(3, 8)), {}
    yield (rand(8), ints(2, 8)), {"indexes": ints(2, 8)}
    yield (rand(8, 3), ints(2, 8, 3)), {}
    yield (rand(8, 3).softmax(-1), rand(8, 3).softmax(-1)), {}
    yield (rand(2, 5, 3), ints(3, 2, 5)), {}
    yield (rand(2, 64), rand(2, 64)), {}
    yield (rand(1, 3, 24, 24), rand(1, 3, 24, 24)), {}
    yield (rand(1, 3, 24, 24),), {}
    yield (rand(1, 1, 192, 192), rand(1, 1, 192, 192)), {}
    yield (ints(3, 1, 4, 4, 2), ints(3, 1, 4, 4, 2)), {}
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "lay"]
    said, heard = " ".join(words[step % 3 : 9]), " ".join(words[: 8 + step % 3])
    yield (ints(5, 8, 3),), {}
    yield ({"a": rand(8), "b": rand(8)}, {"a": rand(8), "b": rand(8)}), {}
    yield (rand(2, 2, 16), rand(2, 2, 16)), {}
    yield ([said], [heard]), {}
    yield ([said], [[heard]]), {}
    yield ([{"prediction_text": said, "id": "1"}], [{"answers": {"answer_start": [1], "text": [heard]}, "id": "1"}]), {}


def _fitting(kind: Any) -> tuple[dict[str, Any], int]:
    """The first arguments, and the number of the first input, with which a metric computes something."""
    told = ""
    for arguments in _metric_arguments():
        try:
            kind(**arguments)
        except Exception as e:  # noqa: BLE001 - the next may fit
            told = told or repr(e)
            continue
        for number, (args, kwargs) in enumerate(_metric_inputs(0)):
            metric = kind(**copy.deepcopy(arguments))
            try:
                metric.update(*args, **kwargs)
                metric.compute()
            except Exception as e:  # noqa: BLE001
                told = repr(e)
            else:
                return arguments, number
    raise TypeError(f"no arguments and inputs here fit it: {told}")


def _metric_rig(kind: Any, persistent: bool) -> Rig:
    arguments, number = _fitting(kind)
    metric = kind(**arguments)
    if persistent:
        metric.persistent(True)

    def update(step: int) -> Any:
        args, kwargs = list(_metric_inputs(step))[number]
        metric.update(*args, **kwargs)
        return metric.compute()

    return _beside(Tiny(), update, metric=metric)


def _metrics() -> Subjects:
    package = importlib.import_module("torchmetrics")
    found = {f"metrics/{name}": partial(_metric_rig, kind, True) for name, kind in _classes(package, package.Metric)}
    found["metrics/MeanMetric (not persistent)"] = partial(_metric_rig, package.MeanMetric, False)
    return found


# ---------------------------------------------------------------------------------------------------------------------------- modules


class Queue(nn.Module):
    """Keys of earlier batches, as contrastive learning keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(20, 16))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    queue: torch.Tensor
    position: torch.Tensor

    def forward(self, h_BH: torch.Tensor) -> torch.Tensor:
        queue = self.queue.clone()
        out = h_BH + 0.1 * (h_BH @ queue.T).softmax(-1) @ queue
        rows = (self.position + torch.arange(len(h_BH))) % len(self.queue)
        self.queue[rows] = h_BH.detach()
        self.position.add_(len(h_BH)).remainder_(len(self.queue))
        return out


class ExtraState(nn.Module):
    """A count and a history that are no tensors, kept by ``get_extra_state``."""

    def __init__(self, tensor: bool = False) -> None:
        super().__init__()
        self.count, self.seen, self.mean = 0, [0.5], torch.zeros(16) if tensor else None

    def forward(self, h_BH: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.seen.append(float(h_BH.detach().mean()))
        if self.mean is not None:
            self.mean = 0.9 * self.mean + h_BH.detach().mean(0)
        return h_BH * (1 + 0.1 * self.count) + self.seen[-2] + (0 if self.mean is None else self.mean)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "seen": self.seen, "mean": self.mean}

    def set_extra_state(self, state: Any) -> None:
        self.count, self.seen, self.mean = state["count"], list(state["seen"]), state["mean"]


class Grown(nn.Module):
    """A buffer that is not there before the first forward, and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", None)

    past: torch.Tensor | None

    def forward(self, h_BH: torch.Tensor) -> torch.Tensor:
        now = h_BH.detach().mean(0, keepdim=True)
        self.past = now if self.past is None else torch.cat([self.past, now])
        return h_BH + self.past.mean(0)


class Passing(nn.Module):
    """A buffer that the module's state dict does not list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(16), persistent=False)

    level: torch.Tensor

    def forward(self, h_BH: torch.Tensor) -> torch.Tensor:
        self.level = 0.9 * self.level + h_BH.detach().mean(0)
        return h_BH + self.level


def _module_rig(make: Callable[[], nn.Module]) -> Rig:
    return _beside(Tiny(between=make()), lambda step: None)


def _wrapped(wrap: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    return wrap(nn.Linear(16, 16), *arguments)


def _observer_rig(make: Callable[[], nn.Module]) -> Rig:
    observer = make()

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = observer

        def forward(self, h_BH: torch.Tensor) -> torch.Tensor:
            seen = self.observer(h_BH)
            return h_BH if seen is None else seen

    def parameters(step: int) -> Any:
        with contextlib.suppress(Exception):  # not all compute any
            return observer.calculate_qparams()  # type: ignore[operator]

    return _beside(Tiny(between=Observed()), parameters)


def _observers() -> Subjects:
    from torch.ao import quantization
    from torch.ao.quantization import fake_quantize, observer

    found: Subjects = {}
    for module in (observer, fake_quantize):
        for name, kind in _classes(module, nn.Module):
            if not inspect.isabstract(kind) and name != "Module":
                made = partial(kind, 0.1, 0) if name == "FixedQParamsObserver" else kind
                if name == "FixedQParamsFakeQuantize":
                    made = partial(kind, partial(observer.FixedQParamsObserver, 0.1, 0))
                found.setdefault(f"observers/{name}", partial(_observer_rig, made))  # type: ignore[arg-type]
    per_channel = partial(fake_quantize.FakeQuantize, quantization.MovingAveragePerChannelMinMaxObserver, ch_axis=1, qscheme=torch.per_channel_affine)
    found["observers/FakeQuantize by channel"] = partial(_observer_rig, per_channel)
    fused = partial(
        fake_quantize.FusedMovingAvgObsFakeQuantize, quantization.MovingAveragePerChannelMinMaxObserver, ch_axis=0, qscheme=torch.per_channel_affine
    )
    found["observers/FusedMovingAvgObsFakeQuantize by channel"] = partial(_observer_rig, fused)
    return found


def _modules() -> Subjects:
    from torch.nn.utils import parametrizations, prune

    makes: dict[str, Callable[[], nn.Module]] = {
        "BatchNorm1d": lambda: nn.BatchNorm1d(16),
        "BatchNorm1d (cumulative)": lambda: nn.BatchNorm1d(16, momentum=None),  # type: ignore[arg-type]
        "InstanceNorm1d": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten()),
        "Dropout": lambda: nn.Dropout(0.3),
        "queue": Queue,
        "extra state of numbers": ExtraState,
        "extra state with a tensor": lambda: ExtraState(tensor=True),
        "buffer that grows": Grown,
        "buffer that is not persistent": Passing,
    }
    for name in ("spectral_norm", "weight_norm"):
        makes[f"nn.utils.{name}"] = partial(_wrapped, getattr(nn.utils, name))
    for name, wrap in inspect.getmembers(parametrizations, inspect.isfunction):
        if wrap.__module__ == parametrizations.__name__ and not name.startswith("_"):
            makes[f"parametrizations.{name}"] = partial(_wrapped, wrap)
    arguments = {"random_structured": (0.5, 0), "ln_structured": (0.5, 2, 0), "custom_from_mask": (torch.eye(16),), "identity": ()}
    for name, wrap in inspect.getmembers(prune, inspect.isfunction):
        if "name" in inspect.signature(wrap).parameters and name not in ("remove", "global_unstructured") and not name.startswith("_"):
            makes[f"prune.{name}"] = partial(_wrapped, wrap, "weight", *arguments.get(name, (0.5,)))
    return {f"modules/{name}": partial(_module_rig, make) for name, make in makes.items()}


# ------------------------------------------------------------------------------------------------------------------------ all of them


def _bare(package: str) -> None:
    """Register a package without running its own code, so that modules of it import which do not need what it needs."""
    spec = find_spec(package)
    assert spec is not None
    sys.modules[package] = module_from_spec(spec)


def _import_timm() -> None:
    """timm imports torchvision, which only its models need."""
    try:
        importlib.import_module("timm.optim")
    except ModuleNotFoundError as e:
        if e.name != "torchvision":
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
        for package in ("timm", "timm.optim", "timm.utils"):
            _bare(package)


_FAMILIES: dict[str, tuple[str, Callable[[], Subjects]]] = {
    **{family: (family.partition(".")[0], partial(_optimizers, family)) for family in _OPTIMIZERS},
    "torch schedulers": ("torch", _torch_schedulers),
    "transformers schedulers": ("transformers", _transformers_schedulers),
    "timm schedulers": ("timm", _timm_schedulers),
    "deepspeed schedulers": ("deepspeed", _deepspeed_schedulers),
    "pytorch_optimizer schedulers": ("pytorch_optimizer", _pytorch_optimizer_schedulers),
    "scalers and samplers": ("torch", _member_subjects),
    "averages": ("torch", _averages),
    "averages of timm": ("timm", _timm_averages),
    "metrics": ("torchmetrics", _metrics),
    "observers": ("torch", _observers),
    "modules": ("torch", _modules),
}


def _find_all() -> Subjects:
    found: Subjects = {}
    for family, (package, enumerate_family) in _FAMILIES.items():
        if find_spec(package) is None:
            ABSENT[family] = f"{package} is not installed"
            continue
        try:
            if package == "timm":
                _import_timm()
            found |= enumerate_family()
        except Exception as e:  # noqa: BLE001 - a package that does not import here is no reason to try no other
            ABSENT[family] = f"{package} {version(package)} does not import here: {e!r}"
    return found


SUBJECTS = _find_all()
