"""The recipe inside ranks that are there already: a job for test_indextts_run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import Progress
from engine.errors import EngineError
from engine.plan import assign
from recipes import indextts_amharic
from recipes.lib.journal import Journal
from recipes.lib.pairs import Pairs
from recipes.lib.world import World
from tests.now import Checkpointer

warnings.simplefilter("ignore")


class Stopped(BaseException):
    """In place of a kill: every rank stops dead, and nothing is tidied up."""


def run(argv: list[str], stop_after: int | None = None, frozen_bytes: int | None = None) -> dict[str, Any]:
    """What was told, which training pairs this rank was given after how many steps of its own, and the error, if there was one.
    ``frozen_bytes``: from how many on frozen weights get files of their own."""
    lines: list[str] = []
    seen: list[tuple[int, str]] = []
    steps = 0
    step, get = indextts_amharic.train_step, Pairs.__getitem__

    def counted(*args: Any) -> torch.Tensor:
        nonlocal steps
        if steps == stop_after:
            raise Stopped
        steps += 1
        return step(*args)

    def noted(self: Pairs, index: int) -> dict[str, torch.Tensor]:
        if "train" in self.manifest.name:
            seen.append((steps, self.pairs[index].id))
        return get(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "line", lambda self, text: lines.append(text))
        patch.setattr(indextts_amharic, "train_step", counted)
        patch.setattr(Pairs, "__getitem__", noted)
        if stop_after is not None:
            # A step saved behind training may not be there yet when the next run looks for it.
            patch.setattr(indextts_amharic, "Checkpointer", Checkpointer)
        if frozen_bytes is not None:
            patch.setattr(assign, "FROZEN_BYTES", frozen_bytes)
        error = ""
        try:
            indextts_amharic.run(argv, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
        except EngineError as e:
            error = f"{type(e).__name__}: {e}"
        except Stopped:
            error = "stopped"
    losses = [line for line in lines if line.startswith("epoch ")]
    return {"lines": lines, "losses": losses, "seen": seen, "error": error, "steps": steps}


def save_weights(run: str) -> None:
    """A step that holds a model and nothing to train it with."""
    Checkpointer(run, torch.nn.Linear(2, 2), config={"preset": "tiny"}).save(Progress(step=3))
