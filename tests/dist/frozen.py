"""A language model with an extended vocabulary, of which the first rows are frozen in one way or another, under every engine: jobs for
test_frozen."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo import _gathered, _initialize, _on_any_cpu
from engine import freeze_rows
from engine_kernels import convert

ROWS, WIDTH, BASE = 23, 6, 11
FROZEN = {"text_embedding.weight": BASE, "text_head.weight": BASE, "text_head.bias": BASE}
LOW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
warnings.simplefilter("ignore")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_embedding, self.trunk, self.text_head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = torch.tanh(self.trunk(self.text_embedding(ids_BT[:, :-1])))
        if type(self.text_head) is nn.Linear:
            return F.cross_entropy(self.text_head(x_BTD).flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        return self.text_head(x_BTD, target=ids_BT[:, 1:])


class Run:
    """``how``: ``modules`` (converted), ``rows`` (freeze_rows, whenever that is called) or ``hook`` (what the field does, drifting)."""

    def __init__(self, engine: str, dtype: str, how: str, accumulation: int, clip: float, lr: float = 1e-2) -> None:
        self.engine, self.dtype, self.accumulation, self.clip = engine, dtype, accumulation, clip
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.model = Model()
        if how == "modules":
            convert(self.model, {"text_embedding": BASE, "text_head": BASE})
        elif how == "hook":
            for name in FROZEN:
                self.model.get_parameter(name).register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:BASE]), grad[BASE:]]))
        self.autocast, self.scaler = contextlib.nullcontext(), torch.amp.GradScaler("cpu", enabled=False)
        if engine.startswith("zero"):
            self._under_zero(lr)
        else:
            self._plain(lr)

    def _plain(self, lr: float) -> None:
        low, forward = LOW[self.dtype], self.model
        if self.engine == "single":  # low precision through and through
            self.model.to(low)
        elif self.engine == "ddp":
            forward = nn.parallel.DistributedDataParallel(self.model)
            self.autocast = torch.autocast("cpu", low, enabled=self.dtype != "fp32")
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=self.dtype == "fp16")
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(param_dtype=None if self.dtype == "fp32" else low, reduce_dtype=torch.float32)
            fully_shard(self.model, mesh=init_device_mesh("cpu", (self.world,)), mp_policy=policy)
        self.forward: Any = forward
        eps = 1e-4 if low is torch.float16 else 1e-8
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1, eps=eps)
        self.member: Any = (forward, self.optimizer)

    def _under_zero(self, lr: float) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 12 // self.world // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {"stage": int(self.engine[4]), "stage3_param_persistence_threshold": 5, "memory_efficient_linear": False},
            "gradient_clipping": self.clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.dtype == "bf16"},
            "fp16": {"enabled": self.dtype == "fp16", "initial_scale_power": 6},
        }
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
        with _on_any_cpu(self.dtype):
            self.member = _initialize(model=self.model, optimizer=optimizer, config=config)

    def step(self, number: int) -> float:
        """One optimizer step; returns the norm of all gradients before it is clipped."""
        ids_BT = torch.randint(0, ROWS, (12, 7), generator=torch.Generator().manual_seed(number)).chunk(self.world)[self.rank]
        if self.engine.startswith("zero"):
            with _on_any_cpu(self.dtype):
                for part in ids_BT.chunk(self.accumulation):
                    self.member.backward(self.member(part))
                    self.member.step()
            return float(self.member.get_global_grad_norm() or 0.0)
        for part in ids_BT.chunk(self.accumulation):
            with self.autocast:
                loss = self.forward(part) / self.accumulation
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def whole(self) -> dict[str, torch.Tensor]:
        """What the model computes with, under the names of the original's state dict."""
        found: dict[str, torch.Tensor] = {}
        for name, p in self.model.named_parameters():
            with _gathered(p):
                found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for owner in ("text_embedding", "text_head"):
            for whole, parts in (("weight", ("frozen", "trainable")), ("bias", ("frozen_bias", "trainable_bias"))):
                if f"{owner}.{parts[0]}" in found:
                    found[f"{owner}.{whole}"] = torch.cat([found.pop(f"{owner}.{part}") for part in parts])
        return found

    def close(self) -> None:
        if self.engine.startswith("zero"):
            self.member.destroy()


def train(engine: str, dtype: str, how: str, steps: int, *, accumulation: int = 2, clip: float = 0.5, before: int = 0) -> dict[str, Any]:
    """``before``: unfrozen steps, after which the rows are frozen, in a model and an optimizer that have been trained."""
    run = Run(engine, dtype, how, accumulation, clip)
    for number in range(before):
        run.step(number)
    if how == "rows":
        freeze_rows(run.member, FROZEN)
    began = run.whole()
    norms = [run.step(before + number) for number in range(steps)]
    ended = run.whole()
    run.close()
    drift = max((ended[name][:BASE].double() - began[name][:BASE].double()).abs().max().item() for name in FROZEN)
    same = all(torch.equal(ended[name][:BASE], began[name][:BASE]) for name in FROZEN)
    moved = min((ended[name][BASE:].double() - began[name][BASE:].double()).abs().max().item() for name in FROZEN)
    return {"same": same, "drift": drift, "moved": moved, "norms": norms, "began": began, "ended": ended}
