"""How far a run is, and the random state of each rank."""

import operator
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from engine.errors import UsageError


class Best(msgspec.Struct):
    """The best value of the monitored metric so far, and where it was measured."""

    value: float
    step: int
    epoch: int


class Progress(msgspec.Struct):
    """``epoch``: completed epochs; ``step``: optimizer steps done; ``samples``: global samples consumed, over all epochs.

    A save keeps the rest: ``metrics``, the latest value of each; ``history``, an entry for each save that was given metrics, with
    its ``epoch`` and ``step``; ``best`` and ``stale``, with a monitor: the best value, and how many values in a row have not bettered
    it (for early stopping). ``wandb_run_id`` is for a tracker to go on under the same id.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    best: Best | None = None
    stale: int = 0
    wandb_run_id: str = ""

    def advance(self, samples: int) -> None:
        """One optimizer step is done; all ranks together consumed ``samples`` for it."""
        self.step += 1
        self.samples += samples

    def plain(self, metrics: Mapping[str, float], monitor: "Monitor | None" = None) -> "Progress":
        """A copy in plain Python numbers, with ``metrics`` taken in. Raises :class:`UsageError` naming what is no number, or that the
        monitored metric is not among those given."""
        try:
            epoch, step, samples = (operator.index(n) for n in (self.epoch, self.step, self.samples))
            given = {str(k): float(v) for k, v in metrics.items()}
            known = {str(k): float(v) for k, v in self.metrics.items()}
            history = [{str(k): float(v) for k, v in entry.items()} for entry in self.history]
        except (TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"progress takes whole numbers for epoch, step and samples, and numbers for metrics and history: {e}") from e
        if min(epoch, step, samples) < 0:
            raise UsageError(f"progress cannot be negative: epoch {epoch}, step {step}, samples {samples}")
        if given:
            history = [entry for entry in history if entry.get("step") != step]  # a step that is saved again
            history.append({"epoch": float(epoch), "step": float(step), **given})
        made = Progress(epoch, step, samples, {**known, **given}, history, wandb_run_id=str(self.wandb_run_id))
        if monitor is not None and (given or monitor.metric in known):
            monitor.judge(made)
        return made

    def take(self, other: "Progress") -> None:
        """Become ``other``, in place."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(other, name))


class Monitor(msgspec.Struct, frozen=True):
    """Which metric decides what is best: the smallest (``min``) or the largest (``max``). NaN is never best."""

    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise UsageError(f"mode is {self.mode!r}; it says whether the best {self.metric} is the smallest or the largest: 'min' or 'max'")

    def judge(self, progress: Progress) -> None:
        """Set ``best`` and ``stale`` from the history. Raises :class:`UsageError` if the metric was never given."""
        if self.metric not in progress.metrics:
            raise UsageError(
                f"monitor={self.metric!r} is not among the metrics {sorted(progress.metrics)} of this save; give it: save(progress, metrics={{...}})"
            )
        progress.best, progress.stale = None, 0
        for entry in progress.history:
            value = entry.get(self.metric)
            if value is None:
                continue
            if value == value and (progress.best is None or self.is_better(value, progress.best.value)):
                progress.best, progress.stale = Best(value, int(entry.get("step", 0)), int(entry.get("epoch", 0))), 0
            else:
                progress.stale += 1

    def is_better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than


def capture_rng() -> dict[str, Any]:
    """This rank's generators: Python, NumPy's legacy global one, torch on CPU and on each CUDA device."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tobytes(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "seed": torch.initial_seed(),
    }
    return state


def restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in state["cuda"]])


def derive_rng(seed: int, step: int, rank: int) -> None:
    """New, reproducible random state for a rank that the saved run did not have (its world size was another)."""
    words = np.random.SeedSequence([seed & (2**64 - 1), step, rank]).generate_state(4, dtype=np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    torch.manual_seed(int(words[2]) & (2**63 - 1))
