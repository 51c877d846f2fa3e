"""DeepSpeed's mixture of experts under expert parallelism: jobs for test_experts."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine import Progress

from tests.now import Checkpointer

EXPERTS, WIDTH = 4, 6
warnings.simplefilter("ignore")


@contextlib.contextmanager
def _built(stage: int, ep_size: int, seed: int, dtype: str):
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    world, rank = dist.get_world_size(), dist.get_rank()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(WIDTH, WIDTH)
            expert = nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, WIDTH))
            self.moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=ep_size, k=1, min_capacity=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, auxiliary, _ = self.moe(self.into(x))
            return y.pow(2).mean() + 0.01 * auxiliary

    torch.manual_seed(seed)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
        model = Model()
        for name, parameter in model.named_parameters():
            if "deepspeed_experts." in name:  # an expert starts alike under every expert-parallel size
                components = name.split(".")
                at = components.index("deepspeed_experts") + 1
                number = rank % ep_size * (EXPERTS // ep_size) + int(components[at])
                generator = torch.Generator().manual_seed(1000 * seed + 17 * number + sum(map(ord, ".".join(components[at + 1 :]))))
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
        config: dict[str, Any] = {
            "train_batch_size": 4 * world,
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": dtype == "bf16"},
        }
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config, dist_init_required=False)

    def step(number: int) -> float:
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(number)).chunk(world)[rank]
        loss = wrapped(x.bfloat16() if dtype == "bf16" else x)
        wrapped.backward(loss)
        wrapped.step()
        return loss.item()

    yield wrapped, step
    wrapped.destroy()


def _live(checkpointer: Checkpointer) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Everything that any rank holds, as (name, offsets, shape of the whole, values)."""
    held = [
        (shard.name, box.offsets, shard.tensor.shape, view.detach().float().clone())
        for shard in checkpointer._members.model_shards()
        for box, view in shard.held(dist.get_rank())
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, held)
    return [entry for by_rank in gathered for entry in by_rank]


def _whole(checkpointer: Checkpointer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, offsets, shape, values in _live(checkpointer):
        whole = found.setdefault(name, torch.full(shape, float("nan")))
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    return found


def save(run: str, stage: int, ep_size: int, dtype: str) -> dict[str, Any]:
    with _built(stage, ep_size, 0, dtype) as (member, step):
        for number in range(3):
            step(number)
        checkpointer = Checkpointer(run, member, replicas="all")
        checkpointer.save(Progress(step=3))
        whole = _whole(checkpointer)
        return {"whole": whole, "losses": [step(3 + number) for number in range(2)]}


def load(run: str, stage: int, ep_size: int, dtype: str) -> dict[str, Any]:
    with _built(stage, ep_size, 1, dtype) as (member, step):
        step(50)
        checkpointer = Checkpointer(run, member)
        before = _whole(checkpointer)
        checkpointer.resume("latest")
        difference, whole = checkpointer.max_difference(), _whole(checkpointer)
        return {"before": before, "whole": whole, "difference": difference, "losses": [step(3 + number) for number in range(2)]}
