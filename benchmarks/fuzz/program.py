"""A case's training program under one engine: what it holds, and one step of it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.fuzz.cases import Case, Side
from benchmarks.fuzz.members import Apart, Average, Notes, Position, Scaler, Teacher, ungathered
from benchmarks.fuzz.modules import VOCABULARY, build
from benchmarks.fuzz.optimizers import OPTIMIZERS, SCHEDULERS
from benchmarks.zoo import VARIANTS, _initialize, _zero_options
from engine import ElasticSampler, PerRank

BATCH = 12  # divides by 1, 2 and 3 ranks
SAMPLES = 40  # of an epoch: three batches, and some left over


class Program:
    """``model`` and ``members`` are what a Checkpointer takes; ``module``, ``optimizers`` and ``schedulers`` what they hold."""

    def __init__(self, case: Case, side: Side, seed: int, factor: float) -> None:
        self.case, self.side = case, side
        torch.manual_seed(seed)  # for what modules draw themselves
        self.module = build(case.tree, seed, case.dtype, case.tied, case.frozen)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed: Any = None
        groups = self._groups(factor)
        if side.engine == "fsdp2":
            self._shard()
            groups = self._groups(factor)
        self.optimizers = [OPTIMIZERS[one.optimizer](given) for one, given in zip(case.trained, groups)]
        self.schedulers = [SCHEDULERS[one.scheduler](optimizer) if one.scheduler else None for one, optimizer in zip(case.trained, self.optimizers)]
        self.forward: Any = self.module
        if side.engine.startswith("zero"):
            self._zero()
        elif side.engine == "ddp":
            unused = any(node.kind == "unused" for node in case.tree.walk())
            self.forward = nn.parallel.DistributedDataParallel(self.module, find_unused_parameters=unused, init_sync=False, broadcast_buffers=False)
        self.members: dict[str, Any] = {}
        self.model = self._model()
        if case.named:
            self.model, self.members["student"] = None, self.model
        self.objects: dict[str, Any] = {}
        for name, kind in case.members.items():
            self._add_member(name, kind, seed)
        self._indices: Any = None

    def _groups(self, factor: float) -> list[list[dict[str, Any]]]:
        """Param groups of each optimizer: matrices for the first of two, the rest for the second."""
        case = self.case
        given = [p for p in self.module.parameters() if p.requires_grad or case.frozen_given]
        if case.left_out:
            last = next(p for p in reversed(given) if p.requires_grad)
            given = [p for p in given if p is not last]
        parts = [given]
        if len(case.trained) == 2:
            is_first = [p.ndim == 2 and p.numel() > 0 for p in given]
            parts = [[p for p, first in zip(given, is_first) if first == which] for which in (True, False)]
        return [self._cut(one, part, factor) for one, part in zip(case.trained, parts)]

    def _cut(self, one: Any, part: list[nn.Parameter], factor: float) -> list[dict[str, Any]]:
        trained = [p for p in part if p.requires_grad]
        groups = []
        for i in range(min(one.groups, len(trained))):
            lr: Any = 0.01 * factor / (i + 1)
            if one.tensor_lr:
                lr = torch.tensor(lr)
            params = trained[i :: one.groups]
            if i == 0:
                params += [p for p in part if not p.requires_grad]
            groups.append({"params": params, "lr": lr, "weight_decay": 0.1 * (i % 2), "label": f"g{i}"})
        return groups

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (self.world_size,))
        if self.case.wrapped and not self.case.tied:
            for child in reversed(list(self.module.net.modules())):  # inner ones first
                if child is not self.module.net and type(child).__name__ in (
                    "Affine",
                    "Tree",
                    "Conv",
                    "Embed",
                ):
                    fully_shard(child, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def _zero(self) -> None:
        config: dict[str, Any] = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // self.world_size,
            "zero_optimization": _zero_options(VARIANTS[self.side.engine]),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        if self.case.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        optimizer, scheduler = self.optimizers[0], self.schedulers[0]
        self.deepspeed = self.forward = _initialize(model=self.module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
        inner: Any = self.deepspeed.optimizer.optimizer
        self.optimizers = [inner]

    def _model(self) -> Any:
        """As a program gives it: the fewest it can."""
        if self.deepspeed is not None:
            return self.deepspeed
        schedulers = [scheduler for scheduler in self.schedulers if scheduler is not None]
        if len(self.optimizers) == 1:
            return (self.forward, self.optimizers[0], *schedulers)
        if not schedulers:
            return self.forward, self.optimizers
        return self.forward, self.optimizers, schedulers

    def _add_member(self, name: str, kind: str, seed: int) -> None:
        if name == "sampler":
            made: Any = ElasticSampler(range(SAMPLES), BATCH, seed=3)
        elif name == "ema":
            made = Average(self.module, self.gathered)
        elif name == "scaler":
            made = Scaler()
        elif name == "apart":
            made = Apart(self.rank)
        elif name == "teacher":
            made = Teacher(seed)
        elif name == "position":
            made = Position(self.rank, seed)
        else:
            made = Notes(kind, seed)
        self.objects[name] = made
        self.members[name] = PerRank(made) if name == "position" else made

    @property
    def gathered(self) -> Any:
        if self.side.engine != "zero3":
            return ungathered
        import deepspeed

        return deepspeed.zero.GatheredParameters

    def step(self, number: int) -> tuple[float, list[int]]:
        """Train on the batch of a step; return this rank's loss, and what all ranks drew from the sampler."""
        drawn = self._draw()
        start = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(0, VOCABULARY, (BATCH,), generator=start)
        if drawn:
            ids = (ids + torch.tensor(drawn)) % VOCABULARY
        loss = self.forward(ids.chunk(self.world_size)[self.rank])
        if self.deepspeed is not None:
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        else:
            loss.backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers):
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
            for p in self.module.parameters():
                p.grad = None  # of those that no optimizer has
        for made in self.objects.values():
            if hasattr(made, "step"):
                made.step()
        return loss.item(), drawn

    def _draw(self) -> list[int]:
        if "sampler" not in self.objects:
            return []
        for _ in range(2):
            if self._indices is None:
                self._indices = iter(self.objects["sampler"])
            with contextlib.suppress(StopIteration):
                found: list[Any] = [None] * self.world_size
                dist.all_gather_object(found, next(self._indices))
                return [index for part in found for index in part]
            self._indices = None
        raise AssertionError("an epoch without a batch")

    def unfreeze(self) -> None:
        """Train one more parameter from now on."""
        frozen = next(p for p in self.module.parameters() if not p.requires_grad)
        frozen.requires_grad_(True)
        self.optimizers[-1].add_param_group({"params": [frozen], "lr": 0.003, "label": "late"})

    def resumed(self) -> None:
        """Begin to draw samples where the sampler is now."""
        self._indices = None

    def close(self) -> None:
        if self.deepspeed is not None:
            self.deepspeed.destroy()
