"""How far a run is, and the random state of each rank."""

import operator
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from engine.errors import UsageError


class Progress(msgspec.Struct):
    """``epoch``: completed epochs; ``step``: optimizer steps done; ``samples``: global samples consumed, over all epochs."""

    epoch: int = 0
    step: int = 0
    samples: int = 0
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []

    def advance(self, samples: int) -> None:
        """One optimizer step is done; all ranks together consumed ``samples`` for it."""
        self.step += 1
        self.samples += samples

    def plain(self, metrics: Mapping[str, float]) -> "Progress":
        """A copy in plain Python numbers, with ``metrics`` over its own. Raises :class:`UsageError` naming what is no number."""
        try:
            numbers = {name: operator.index(getattr(self, name)) for name in ("epoch", "step", "samples")}
            merged = {str(k): float(v) for k, v in {**self.metrics, **metrics}.items()}
            history = [{str(k): float(v) for k, v in entry.items()} for entry in self.history]
        except (TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"progress takes whole numbers for epoch, step and samples, and numbers for metrics and history: {e}") from e
        if min(numbers.values()) < 0:
            raise UsageError(f"progress cannot be negative: {numbers}")
        return Progress(**numbers, metrics=merged, history=history)


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
