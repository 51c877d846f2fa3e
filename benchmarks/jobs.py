"""What the ranks of the matrix do. A file of its own, so that ranks import little."""

from __future__ import annotations

import logging
import os
import re
import warnings
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.zoo import Trained, build
from engine import Checkpointer, Progress
from engine.errors import EngineError
from engine.storage import LocalStorage
from engine.transfer.compare import differences
from engine.transfer.stored import StoredCheckpoint

STEPS = 4
CAST = ["model.frozen.weight", "buffers.*"]
"""What DeepSpeed's bf16 and fp16 keep in low precision and the others in fp32."""
_IDLE = re.compile(r"\bunused\.|\b(mix|gain|conv\.bias)\.codes$")


def save_source(engine: str, kind: dict[str, Any], run: str) -> dict[str, Any]:
    """Train, save, and train on. Returns ``refused`` (the message) or ``losses``, of the two steps after the save."""
    _quiet()
    trained = build(engine, seed=0, **kind)
    try:
        for number in range(STEPS):
            trained.step(number)
        try:
            Checkpointer(run, trained.member, max_in_flight=0, **trained.members).save(Progress(step=STEPS, samples=STEPS * 12))
        except EngineError as e:
            return {"refused": f"save: {type(e).__name__}: {e}"}
        numbers = trained.numbers()
        skipped = numbers.get("skipped_steps", 2)
        assert kind["dtype"] != "fp16" or skipped == 2, f"{skipped} steps overflowed before the save, and 2 should"
        whole = trained.whole_parameters()
        if dist.get_rank() == 0:
            torch.save({"whole": whole, "numbers": numbers}, os.path.join(run, "expected.pt"))
        return {"losses": [trained.global_loss(STEPS + i) for i in range(2)]}
    finally:
        trained.close()


def load_target(engine: str, kind: dict[str, Any], run: str, first_steps: int = 1) -> dict[str, Any]:
    """Build with another seed, show that all differs, resume, compare, and train on.

    Returns ``refused`` (the message) or ``difference``, ``whole`` (parameters as the engine gathers them equal the source's),
    ``changed`` (numbers that do not equal the source's) and ``losses``.
    """
    _quiet()
    trained = build(engine, seed=1, **kind)
    try:
        for number in range(first_steps):
            trained.step(100 + number)
        try:
            checkpointer = Checkpointer(run, trained.member, max_in_flight=0, **trained.members)
            alike = _equal_already(checkpointer, run)
            assert not alike, f"before the load these are equal already, so the cell would show nothing: {alike}"
            checkpointer.resume("latest", allow_cast=CAST if kind["dtype"] != "fp32" else [])
        except EngineError as e:
            return {"refused": f"{type(e).__name__}: {e}"}
        difference = checkpointer.max_difference()
        saved = torch.load(os.path.join(run, "expected.pt"), weights_only=True)
        after = trained.whole_parameters()
        whole = after.keys() == saved["whole"].keys() and all(_same(after[name], saved["whole"][name]) for name in after)
        changed = _changed(trained, saved["numbers"])
        try:
            losses = [trained.global_loss(STEPS + i) for i in range(2)]
        except EngineError as e:
            return {"refused": f"first step: {type(e).__name__}: {e}"}
        return {"difference": difference, "whole": whole, "changed": changed, "losses": losses}
    finally:
        trained.close()


def build_cpu_adam() -> None:
    """DeepSpeed's CPUAdam is compiled when it is first made."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])


def _quiet() -> None:
    """Casts that were asked for, gathers of strided pieces and what a compiler leaves out are not news here."""
    warnings.simplefilter("ignore")
    for name in ("engine", "torch.distributed.tensor", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _changed(trained: Trained, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Saved and present numbers that both engines have and that differ."""
    present = trained.numbers()
    return {name: (value, present[name]) for name, value in saved.items() if name in present and present[name] != value}


def _equal_already(checkpointer: Checkpointer, run: str) -> list[str]:
    """Live tensors that equal the checkpoint's on every rank. The moments of a parameter that never gets a gradient are zero
    everywhere, and the codes of one whose gradients are all the same are all the largest."""
    stored = StoredCheckpoint(LocalStorage(run), f"step_{STEPS:08d}")
    held = [(shard, shard.name) for shard in checkpointer._members.model_shards() if shard.name in stored.tensors and not _IDLE.search(shard.name)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, differences(stored, held, dist.get_rank()))
    return [name for name in found[0] if not any(by_rank[name] for by_rank in found)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal; where one side is kept in low precision, equal to the other's rounded value."""
    low = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(low), b.to(low))
