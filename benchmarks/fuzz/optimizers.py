"""Optimizers and schedulers: torch's, and small ones of one's own that keep every kind of state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from benchmarks.optimizers import BlockwiseMomentum, Factored, ScheduleFree

Groups = list[dict[str, Any]]


class Own(torch.optim.Optimizer):
    """Momentum, with state that each subclass keeps in its own way.

    ``kept``: attributes that change as it steps, and that its state dict does not list."""

    kept: tuple[str, ...] = ()

    def __init__(self, groups: Groups, **further: Any) -> None:
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0, "momentum": 0.9, **further})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    rate = self.rate(p, group)
                    p.mul_(1 - rate * group["weight_decay"]).sub_(self.direction(p, group), alpha=rate)

    def begin(self, group: dict[str, Any]) -> None:
        """Count what a group counts."""

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return float(group["lr"])

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, grad = self.state[p], _grad(p)
        if "mean" not in state:
            state["mean"] = torch.zeros_like(p)
        return state["mean"].mul_(group["momentum"]).add_(grad)


def _grad(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


class IntStep(Own):
    """``step`` is a Python int, as DeepSpeed's optimizers keep it."""

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        return group["lr"] / state["step"] ** 0.5


class FloatStep(Own):
    """Counters as Python floats, bools and strings beside the tensors."""

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        state = self.state[p]
        state["step"] = state.get("step", 0.0) + 1.0
        state["warm"], state["phase"] = state["step"] < 2, f"p{int(state['step'])}"
        state["seen"] = state.get("seen", 0) + 1
        return group["lr"] / state["step"] ** 0.5


class LongStep(Own):
    """``step`` is an int64 tensor, and a float64 one counts beside it."""

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["sum"] = torch.zeros((), dtype=torch.float64)
        state["step"] += 1
        state["sum"] += 1.0 / 3.0
        return group["lr"] / state["step"].item() ** 0.5 + 1e-6 * state["sum"].item()


class OneStep(Own):
    """``step`` is a tensor of shape ``(1,)``."""

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros(1)
        state["step"] += 1
        return group["lr"] / state["step"].item() ** 0.5


class GroupStep(Own):
    """``step`` is in the param group, an int or a 0-d tensor; with other values that are no hyper-parameters."""

    def __init__(self, groups: Groups, kind: str = "int") -> None:
        step: Any = {
            "int": 0,
            "tensor": torch.zeros(()),
            "long": torch.zeros((), dtype=torch.int64),
        }[kind]
        super().__init__(groups, step=step, history=[], best=None)
        for group in self.param_groups:
            group["step"], group["history"] = copy.deepcopy(step), []

    def begin(self, group: dict[str, Any]) -> None:
        group["step"] = group["step"] + 1
        group["history"] = [*group["history"], float(group["step"])][-3:]
        group["best"] = {"at": int(group["step"]), "span": (0.0, 1.0)}

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return group["lr"] / float(group["step"]) ** 0.5


class GroupTensor(Own):
    """A vector in the param group, of which the rate is made."""

    def begin(self, group: dict[str, Any]) -> None:
        group["scale"] = group.get("scale", torch.ones(2)) * 1.01

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return group["lr"] * group["scale"][0].item()


class KeyedState(Own):
    """State that belongs to no parameter, under str keys."""

    def __init__(self, groups: Groups, kind: str = "dict") -> None:
        super().__init__(groups)
        self.kind = kind

    def begin(self, group: dict[str, Any]) -> None:
        if self.kind == "dict":
            shared = self._held()["shared"]
            shared["count"] = shared.get("count", 0) + 1
            shared["norm"] = shared.get("norm", torch.zeros(())) + 0.5
        else:
            self._held()["count"] = self._held().get("count", 0) + 1

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        held = self._held()["shared" if self.kind == "dict" else "count"]
        return group["lr"] / (held["count"] if self.kind == "dict" else held) ** 0.5

    def _held(self) -> Any:
        return self.state


class Nested(Own):
    """Lists and dicts of tensors in a parameter's state."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, grad = self.state[p], _grad(p)
        if not state:
            state["history"] = [torch.zeros_like(p), torch.zeros_like(p)]
            state["inner"] = {"mean": torch.zeros_like(p), "n": 0}
        state["history"] = [grad.clone(), state["history"][0]]
        state["inner"]["n"] += 1
        state["inner"]["mean"].mul_(group["momentum"]).add_(grad)
        return state["inner"]["mean"] + state["history"][1] * 0.1


class Tupled(Own):
    """A tuple of two moments, and None until the second step."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, grad = self.state[p], _grad(p)
        fast, slow = state.get("means", (torch.zeros_like(p), torch.zeros_like(p)))
        state["last"] = fast.clone() if "means" in state else None
        state["means"] = fast * 0.5 + grad, slow * 0.9 + grad
        return state["means"][0] + state["means"][1]


class Lowered(Own):
    """Moments of other dtypes than their parameter's."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, grad = self.state[p], _grad(p)
        if not state:
            state["mean"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["signs"] = torch.zeros_like(p, dtype=torch.int8)
            state["sum"] = torch.zeros_like(p, dtype=torch.float64)
        state["mean"].mul_(group["momentum"]).add_(grad)
        state["signs"].copy_(grad.sign())
        state["sum"].add_(grad.double() / 3)
        return state["mean"].to(p.dtype) + 0.1 * state["signs"].to(p.dtype) + state["sum"].to(p.dtype)


class Replaced(Own):
    """A moment that each step replaces with a new tensor."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[p]
        state["mean"] = state.get("mean", 0.0) * group["momentum"] + _grad(p)
        return state["mean"]


class Shared(Own):
    """One tensor that the states of all parameters of a group hold."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[p]
        if "norm" not in state:
            held = [self.state[q]["norm"] for q in group["params"] if "norm" in self.state.get(q, {})]
            state["norm"] = held[0] if held else torch.zeros(())
        state["norm"].add_(0.25)
        return super().direction(p, group) * (1 + state["norm"].item())


class Lookahead(Own):
    """Slow weights that are a copy of the parameters at times."""

    def direction(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[p]
        if "slow" not in state:
            state["slow"] = p.detach().clone()
        state["slow"].lerp_(p.detach(), 0.5)
        return super().direction(p, group) + (p.detach() - state["slow"])


class Tallied(Own):
    """A state dict with an entry of its own."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self.tally = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.tally += 1

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return group["lr"] / self.tally**0.5

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "tally": self.tally}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.tally = state.pop("tally")
        super().load_state_dict(state)


class Counted(Own):
    """Counts in an attribute."""

    kept = ("steps", "best")

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self.steps, self.best = 0, 1.0

    def begin(self, group: dict[str, Any]) -> None:
        self.steps += 1
        self.best = min(self.best, 1.0 / self.steps)

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return group["lr"] * self.best


class Drawn(Own):
    """Draws its rate from a generator of its own."""

    kept = ("generator",)

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups)
        self.generator = torch.Generator().manual_seed(5)

    def begin(self, group: dict[str, Any]) -> None:
        group["drawn"] = torch.rand((), generator=self.generator).item()

    def rate(self, p: torch.Tensor, group: dict[str, Any]) -> float:
        return group["lr"] * group["drawn"]


class Around(torch.optim.Optimizer):
    """Slow weights around an inner optimizer, whose groups it shares."""

    def __init__(self, groups: Groups) -> None:
        self.base = torch.optim.AdamW(groups)
        super().__init__(self.base.param_groups, {})
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    slow = self.state[p].setdefault("slow", p.detach().clone())
                    p.copy_(slow.lerp_(p.detach(), 0.5))


class Duck:
    """No torch optimizer, but all that one is used for."""

    def __init__(self, groups: Groups) -> None:
        self.inner, self.count = torch.optim.AdamW(groups), 0

    @property
    def param_groups(self) -> Groups:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()
        if self.count % 2:
            self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.count = state["count"]


OPTIMIZERS: dict[str, Callable[[Groups], Any]] = {
    "SGD": torch.optim.SGD,
    "SGD momentum": lambda g: torch.optim.SGD(g, momentum=0.9),
    "SGD nesterov": lambda g: torch.optim.SGD(g, momentum=0.9, nesterov=True),
    "AdamW": lambda g: torch.optim.AdamW(g, betas=(0.9, 0.95)),
    "AdamW foreach": lambda g: torch.optim.AdamW(g, foreach=True),
    "AdamW fused": lambda g: torch.optim.AdamW(g, fused=True),
    "Adam amsgrad": lambda g: torch.optim.Adam(g, amsgrad=True),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "RMSprop centered": lambda g: torch.optim.RMSprop(g, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
    "Factored": Factored,
    "BlockwiseMomentum": BlockwiseMomentum,
    "ScheduleFree": ScheduleFree,
    "IntStep": IntStep,
    "FloatStep": FloatStep,
    "LongStep": LongStep,
    "OneStep": OneStep,
    "GroupStep int": GroupStep,
    "GroupStep tensor": lambda g: GroupStep(g, "tensor"),
    "GroupStep long": lambda g: GroupStep(g, "long"),
    "GroupTensor": GroupTensor,
    "KeyedState dict": KeyedState,
    "KeyedState int": lambda g: KeyedState(g, "int"),
    "Nested": Nested,
    "Tupled": Tupled,
    "Lowered": Lowered,
    "Replaced": Replaced,
    "Shared": Shared,
    "Lookahead": Lookahead,
    "Tallied": Tallied,
    "Counted": Counted,
    "Drawn": Drawn,
    "Around": Around,
    "Duck": Duck,
}


class WarmUp:
    """A rate that rises, then what an inner scheduler says; its state has the inner one's."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: Any, steps: int = 2) -> None:
        self.optimizer, self.after, self.steps, self.count = optimizer, after, steps, 0
        self.full = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def _set(self) -> None:
        for group, full in zip(self.optimizer.param_groups, self.full):
            group["lr"] = full * (self.count + 1) / (self.steps + 1)

    def step(self, *_: Any) -> None:
        self.count += 1
        if self.count <= self.steps:
            self._set()
        else:
            self.after.step()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "full": self.full, "after": self.after.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.full = state["count"], state["full"]
        self.after.load_state_dict(state["after"])


class Gradual(torch_schedulers.LRScheduler):
    """As a warm-up of that name in use: the scheduler that follows is an attribute, so its state dict holds the object."""

    def __init__(self, optimizer: torch.optim.Optimizer, after_scheduler: Any, total: int = 2) -> None:
        self.total, self.after_scheduler, self.finished = total, after_scheduler, False
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch > self.total:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [base * (self.last_epoch + 1) / (self.total + 1) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.finished:
            self.after_scheduler.step()
            self._last_lr = self.after_scheduler.get_last_lr()
        else:
            super().step()
            self.finished = self.last_epoch > self.total


class Tracked:
    """A scheduler that keeps lists, dicts and a tensor, and no ``last_epoch``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.history: list[float] = []
        self.seen: dict[str, Any] = {"n": 0, "best": None}
        self.mean = torch.zeros(2)

    def step(self, *_: Any) -> None:
        self.seen = {"n": self.seen["n"] + 1, "best": (self.seen["n"], 0.5)}
        self.mean = self.mean * 0.5 + self.seen["n"]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * (0.9 + 0.01 * float(self.mean[0]) / self.seen["n"])
        self.history.append(float(self.optimizer.param_groups[0]["lr"]))

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "seen": self.seen, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.seen, self.mean = list(state["history"]), state["seen"], state["mean"]


class Partial:
    """A scheduler whose state dict lists less than it counts."""

    kept = ("count", "low")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.last_epoch, self.count, self.low = optimizer, 0, 0, 1.0

    def step(self, *_: Any) -> None:
        self.last_epoch += 1
        self.count += 2
        self.low *= 0.9
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * self.low / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]


class Decay:
    """A callable with a state of its own, for LambdaLR, which saves it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.99**self.calls


class _Plateau(torch_schedulers.ReduceLROnPlateau):
    """Given no metric, it sees one that stays."""

    def step(self, metrics: Any = 1.0, epoch: int | None = None) -> None:  # type: ignore[override]
        super().step(metrics)


def _sequential(o: torch.optim.Optimizer) -> Any:
    parts: Any = [
        torch_schedulers.LinearLR(o, 0.3, total_iters=2),
        torch_schedulers.CosineAnnealingLR(o, 9),
    ]
    return torch_schedulers.SequentialLR(o, parts, milestones=[2])


def _chained(o: torch.optim.Optimizer) -> Any:
    return torch_schedulers.ChainedScheduler([torch_schedulers.ConstantLR(o, 0.5, 2), torch_schedulers.ExponentialLR(o, 0.9)])


def _deep(o: torch.optim.Optimizer) -> Any:
    parts: Any = [_sequential(o), torch_schedulers.CosineAnnealingWarmRestarts(o, 2, 2)]
    return torch_schedulers.SequentialLR(o, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda n: min(1.0, (n + 1) / 4)),
    "LambdaLR of an object": lambda o: torch_schedulers.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda n: 0.95),
    "StepLR": lambda o: torch_schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, [2, 4], 0.5),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, 0.02, total_steps=40, cycle_momentum=False),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum=False),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, 12, 2.0),
    "ReduceLROnPlateau": lambda o: _Plateau(o, patience=1),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "SequentialLR of SequentialLR": _deep,
    "WarmUp": lambda o: WarmUp(o, torch_schedulers.CosineAnnealingLR(o, 8)),
    "Gradual": lambda o: Gradual(o, torch_schedulers.StepLR(o, 2, 0.5)),
    "Tracked": Tracked,
    "Partial": Partial,
}
