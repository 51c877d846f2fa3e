"""Members that are no models: anything with ``state_dict`` and ``load_state_dict`` that a program keeps beside them."""

import contextlib
from typing import Any

import torch
from torch import nn

from benchmarks.fuzz import values


class Average:
    """An exponential moving average of some parameters, cut as they are; ``gathered`` gives access to a parameter."""

    def __init__(self, module: nn.Module, gathered: Any) -> None:
        named: list[tuple[str, Any]] = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self._followed, self._gathered = dict(named[:3]), gathered
        self.decay, self.updates = 0.9, 0
        self.shadow = {}
        for name, p in self._followed.items():
            with gathered(p):
                self.shadow[name] = p.detach().clone()

    @torch.no_grad()
    def step(self) -> None:
        self.updates += 1
        for name, p in self._followed.items():
            with self._gathered(p):
                self.shadow[name].lerp_(p.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.updates, self.shadow = state["decay"], state["updates"], state["shadow"]


class Scaler:
    """torch's gradient scaler, as far as it counts."""

    def __init__(self) -> None:
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        self._scaler.scale(torch.ones(()))
        self._count = 0

    def step(self) -> None:
        self._count += 1
        self._scaler.update(1024.0 / self._count)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


class Notes:
    """A value of some kind, which each step changes."""

    def __init__(self, kind: str, seed: int) -> None:
        self.held = values.make(kind, seed)

    def step(self) -> None:
        self.held = values.bump(self.held)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


class Apart:
    """Numbers that differ by rank, though nobody says so."""

    def __init__(self, rank: int) -> None:
        self.at = 100 * rank

    def step(self) -> None:
        self.at += 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Teacher(nn.Module):
    """A second model, which no optimizer trains: every step moves it all the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        start = torch.Generator().manual_seed(seed)
        self.lin = nn.Linear(4, 3).requires_grad_(False)
        for p in self.lin.parameters():
            p.copy_(torch.randn(p.shape, generator=start))
        self.norm = nn.BatchNorm1d(3)

    def step(self) -> None:
        with torch.no_grad():
            self.norm(self.lin(torch.ones(2, 4)))
            self.lin.weight.mul_(0.9)


class Position:
    """What each rank has for itself: tensors whose shapes depend on the rank, a generator, numbers."""

    def __init__(self, rank: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + rank)
        self.held: dict[str, Any] = {
            "queue": torch.randn(rank + 1, 2, generator=self.generator),
            "empty": torch.zeros(rank, 3, dtype=torch.int64),
            "low": torch.randn(2, generator=self.generator).to(torch.bfloat16),
            "at": (rank, 0),
        }

    def step(self) -> None:
        self.held["queue"] = torch.randn(self.held["queue"].shape, generator=self.generator)
        self.held["at"] = (self.held["at"][0], self.held["at"][1] + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), **self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = {key: value for key, value in state.items() if key != "generator"}
        self.generator.set_state(state["generator"])


def ungathered(parameter: Any) -> Any:
    return contextlib.nullcontext()
