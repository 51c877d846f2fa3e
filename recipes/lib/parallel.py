"""One surface over DeepSpeed's engines, FSDP2 and DDP: call it, ``backward(loss)``, ``step()``.

A DeepSpeed engine has this surface already; :class:`TorchTrainable` gives it to the other two. Gradients are reduced
across ranks because every call that needs them goes through the wrapper's own ``forward``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recipes.lib.world import World

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
ENGINES = (*ZERO_STAGES, "fsdp2", "ddp")


class Trainable(Protocol):
    optimizer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> Any: ...


@dataclass
class TorchTrainable:
    """A model under FSDP2 or DDP; ``dtype`` is what its forward computes in, the weights stay float32.

    As with a DeepSpeed engine, ``backward`` and ``step`` are called for each of ``accumulation`` micro-batches, of whose losses the mean
    counts; the last one's ``step`` updates. ``scaler`` scales losses in float16.
    """

    module: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    max_norm: float
    dtype: torch.dtype
    accumulation: int = 1
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    _micro_steps: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # FSDP2 casts by its own policy; for DDP this is the cast, and without a lower precision it does nothing.
        autocast = self.dtype != torch.float32 and isinstance(self.module, DistributedDataParallel)
        with torch.autocast(next(self.module.parameters()).device.type, dtype=self.dtype, enabled=autocast):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.accumulation).backward()

    def step(self) -> None:
        """At the last micro-batch: clip to the global norm, update, clear the gradients, advance the schedule."""
        self._micro_steps += 1
        if self._micro_steps % self.accumulation:
            return
        self.scaler.unscale_(self.optimizer)
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        torch.nn.utils.clip_grad_norm_(trained, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()


def trainable(
    module: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    *,
    engine: str,
    blocks: Iterable[nn.Module],
    world: World,
    max_norm: float,
    ds_config: dict[str, Any],
    make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    dtype: torch.dtype | None = None,
    accumulation: int = 1,
) -> Trainable:
    """Put a model, already on its device and equal on every rank, under ``engine``. Every rank calls this.

    FSDP2 shards each of ``blocks`` on its own and the rest together. ``ds_config`` is for DeepSpeed alone, which clips, accumulates and
    computes in a lower precision by its own settings; the optimizer is given the parameters that require a gradient. ``dtype``: what
    forwards compute in, by default bfloat16 on CUDA and float32 elsewhere.
    """
    if engine in ZERO_STAGES:
        import deepspeed  # here, because it takes seconds and the other engines do without it

        optimizer = make_optimizer(p for p in module.parameters() if p.requires_grad)
        scheduler: Any = make_scheduler(optimizer) if make_scheduler else None
        return deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)[0]
    if dtype is None:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    if engine == "fsdp2":
        lower = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        policy = lower if dtype != torch.float32 else MixedPrecisionPolicy()
        for block in blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(module, mp_policy=policy)
    else:
        device_ids = [world.device] if world.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=device_ids)
    optimizer = make_optimizer(p for p in module.parameters() if p.requires_grad)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    return TorchTrainable(module, optimizer, scheduler, max_norm, dtype, accumulation, scaler)


def checkpoint_member(trainable: Trainable) -> Any:
    """What a checkpointer is given for it: DeepSpeed's engine itself, or (module, optimizer, scheduler)."""
    if isinstance(trainable, TorchTrainable):
        return trainable.module, trainable.optimizer, trainable.scheduler
    return trainable
