"""What the ranks of the matrix do. A file of its own, so that ranks import little."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.zoo import build
from engine import Checkpointer, Progress
from engine.errors import EngineError
from engine.storage import LocalStorage
from engine.transfer.compare import differences
from engine.transfer.stored import StoredCheckpoint

STEPS = 3
CAST = ["model.frozen.weight", "buffers.*"]
"""What DeepSpeed's bf16 keeps in bf16 and the others in fp32."""


def save_source(engine: str, dtype: str, unused: bool, run: str) -> list[float]:
    """Train, save, and train on: the losses of the two steps after the save."""
    warnings.simplefilter("ignore")
    trained = build(engine, seed=0, dtype=dtype, unused=unused)
    for number in range(STEPS):
        trained.step(number)
    Checkpointer(run, trained.member).save(Progress(step=STEPS, samples=STEPS * 12))
    whole = trained.whole_parameters()
    if dist.get_rank() == 0:
        torch.save(whole, os.path.join(run, "whole.pt"))
    losses = [trained.global_loss(STEPS + i) for i in range(2)]
    trained.close()
    return losses


def load_target(engine: str, dtype: str, unused: bool, run: str, first_steps: int = 1) -> dict[str, Any]:
    """Build with another seed, show that all differs, resume, compare, and train on.

    Returns ``refused`` (the message) or ``difference``, ``whole`` (parameters as the engine gathers them equal the source's)
    and ``losses``.
    """
    warnings.simplefilter("ignore")
    logging.getLogger("engine").setLevel(logging.ERROR)  # casts that were asked for are not news here
    trained = build(engine, seed=1, dtype=dtype, unused=unused)
    try:
        for number in range(first_steps):
            trained.step(100 + number)
        checkpointer = Checkpointer(run, trained.member)
        alike = _equal_already(checkpointer, run)
        assert not alike, f"before the load these are equal already, so the cell would show nothing: {alike}"
        try:
            checkpointer.resume("latest", allow_cast=CAST if dtype == "bf16" else [])
        except EngineError as e:
            return {"refused": f"{type(e).__name__}: {e}"}
        difference = checkpointer.max_difference()
        saved = torch.load(os.path.join(run, "whole.pt"), weights_only=True)
        after = trained.whole_parameters()
        whole = all(_same(after[name], saved[name]) for name in saved)
        losses = [trained.global_loss(STEPS + i) for i in range(2)]
        return {"difference": difference, "whole": whole, "losses": losses}
    finally:
        trained.close()


def _equal_already(checkpointer: Checkpointer, run: str) -> list[str]:
    """Live tensors that equal the checkpoint's on every rank. The moments of a parameter that never gets a gradient are zero
    everywhere."""
    stored = StoredCheckpoint(LocalStorage(run), f"step_{STEPS:08d}")
    shards = [shard for member in checkpointer._models.values() for shard in member.shards()]
    held = [(shard, shard.name) for shard in shards if shard.name in stored.tensors and "unused." not in shard.name]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, differences(stored, held, dist.get_rank()))
    return [name for name in found[0] if not any(by_rank[name] for by_rank in found)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal; where one side is kept in bf16, equal to the other's rounded value."""
    low = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else a.dtype
    return torch.equal(a.to(low), b.to(low))
