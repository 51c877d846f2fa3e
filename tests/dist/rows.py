"""A language model whose vocabulary is whole, or split into frozen and trainable rows, under every engine: jobs for test_rows."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from engine import Progress
from engine_kernels import convert

from tests.now import Checkpointer

ROWS, WIDTH, BASE = 23, 6, 11
warnings.simplefilter("ignore")


class Whole(nn.Module):
    def __init__(self, seed: int, rows: int = ROWS) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(rows, WIDTH), nn.Linear(WIDTH, rows)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embed(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())


def split(seed: int, rows: int = ROWS) -> nn.Module:
    """The same with its first rows frozen: ``weight`` and ``bias`` in two parameters each."""
    return convert(Whole(seed, rows), {"embed": BASE, "head": BASE})


@contextlib.contextmanager
def _built(engine: str, is_split: bool, seed: int, dtype: str, rows: int):
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = split(seed, rows) if is_split else Whole(seed, rows)
    world, rank = dist.get_world_size(), dist.get_rank()
    optimizer: Any = lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)  # noqa: E731

    def batch(number: int) -> torch.Tensor:
        return torch.randint(0, rows, (12, 7), generator=torch.Generator().manual_seed(number)).chunk(world)[rank]

    if engine.startswith("zero"):
        import deepspeed

        config: dict[str, Any] = {
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 12 // world,
            "zero_optimization": {"stage": int(engine[4]), "stage3_param_persistence_threshold": 5},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": dtype == "bf16"},
        }
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer(), config=config, dist_init_required=False)

        def step(number: int) -> float:
            loss = wrapped(batch(number))
            wrapped.backward(loss)
            wrapped.step()
            return loss.item()

        yield wrapped, step
        wrapped.destroy()
        return
    forward: Any = model
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif world > 1:
        forward = nn.parallel.DistributedDataParallel(model)
    made = optimizer()

    def plain_step(number: int) -> float:
        loss = forward(batch(number))
        loss.backward()
        made.step()
        made.zero_grad()
        return loss.item()

    yield (forward, made), plain_step


def save(run: str, engine: str, is_split: bool, dtype: str = "fp32", rows: int = ROWS) -> list[float]:
    with _built(engine, is_split, 0, dtype, rows) as (member, step):
        for number in range(2):
            step(number)
        Checkpointer(run, member).save(Progress(step=2))
        return [step(2 + number) for number in range(2)]


def load(run: str, engine: str, is_split: bool, dtype: str = "fp32", rows: int = ROWS, more: int = 2, **resume: Any) -> dict[str, Any]:
    """The error, or the largest difference from what is stored, the next losses, and the vocabulary's weight with its first moment."""
    with _built(engine, is_split, 1, dtype, rows) as (member, step):
        step(50)
        checkpointer = Checkpointer(run, member)
        before = _whole(checkpointer, "model.embed.weight")
        try:
            checkpointer.resume("latest", **resume)
        except Exception as e:  # noqa: BLE001 - told to the test
            return {"error": f"{type(e).__name__}: {e}"}
        tensors = {key: _whole(checkpointer, key) for key in ("model.embed.weight", "optim.state.embed.weight.exp_avg")}
        difference = checkpointer.max_difference() if rows == ROWS else None
        return {"difference": difference, "losses": [step(2 + number) for number in range(more)], "before": before, **tensors}


def _whole(checkpointer: Checkpointer, name: str) -> torch.Tensor:
    """A logical tensor gathered from all ranks' live views; nan where no rank holds anything."""
    shard = next(shard for shard in checkpointer._members.model_shards() if shard.name == name)
    whole = torch.full(shard.tensor.shape, float("nan"), dtype=torch.float64)
    held = [(box, view.detach().double().clone()) for box, view in shard.held(dist.get_rank())]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, held)
    for box, view in (pair for by_rank in gathered for pair in by_rank):
        whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] = view
    return whole
