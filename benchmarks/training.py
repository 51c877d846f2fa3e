"""What is trained and what is held while saves are measured: a small trunk that really steps, and large or many-tensored state."""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 2048


class Trunk:
    """Forward, backward, all-reduce and optimizer step of a small network, by DDP on a group of its own. ``seconds`` is about how
    long a step takes: the batch is doubled until it does."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._net = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(256, 256) for _ in range(6))), process_group=dist.new_group())
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=1e-3)
        self._x_BD = torch.randn(256, 256)
        while self.usual(5) < seconds:
            self._x_BD = torch.cat([self._x_BD, self._x_BD])

    def step(self) -> float:
        began = time.perf_counter()
        self._net(self._x_BD).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - began

    def usual(self, steps: int = 20) -> float:
        """The median step of all ranks: the smallest rank's, so that all see one number."""
        return slowest(sorted(self.step() for _ in range(steps))[steps // 2], dist.ReduceOp.MIN)


def slowest(seconds: float, op: Any = dist.ReduceOp.MAX) -> float:
    """The largest of all ranks' values."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op)
    return value.item()


class Weights(nn.Module):
    """``count`` parameters of ``shape``, of which every one gets a gradient."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        for i in range(count):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.rand(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(p.mean() for p in self.parameters())


def weights_of(mebibytes_a_rank: int) -> Weights:
    """Of which parameters and AdamW's two moments, cut evenly, are so large on each rank."""
    rows = mebibytes_a_rank * 2**20 * dist.get_world_size() // (12 * WIDTH)
    return Weights(16, (rows // 16, WIDTH))


def under_fsdp2(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With the moments of one step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def under_zero(model: nn.Module, x: torch.Tensor, stage: int = 1) -> Any:
    """In fp32, with the moments of one step on ``x``."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with warnings.catch_warnings(), open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        warnings.simplefilter("ignore")
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        engine.backward(engine(x).square().mean())
        engine.step()
    return engine


def quiet() -> None:
    """Saves are not told of one by one, nor what FSDP2 and DCP themselves use that is deprecated."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for name in ("engine", "torch.distributed.checkpoint", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def local_tensors(member: Any) -> list[torch.Tensor]:
    """This rank's part of parameters and moments; of a DeepSpeed engine, of the moments."""
    module, optimizer = member if isinstance(member, tuple) else (nn.Module(), member.optimizer.optimizer)
    moments = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    held: list[Any] = [t.detach() for t in (*module.parameters(), *moments)]
    return [t.to_local() if hasattr(t, "to_local") else t for t in held]
