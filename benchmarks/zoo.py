"""A small transformer with every awkward shape, and one way to train it under each engine."""

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "ddp", "single")
GLOBAL_BATCH = 12  # divides by 1, 2, 3 and 4 ranks
VOCABULARY, WIDTH, LENGTH = 37, 16, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.odd, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, 7), nn.Linear(7, WIDTH)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x_BTD)).split(WIDTH, -1)
        scores = (q @ k.transpose(-1, -2)) * WIDTH**-0.5
        mask = torch.full(scores.shape[-2:], float("-inf"), device=scores.device, dtype=scores.dtype).triu(1)
        x_BTD = x_BTD + self.out((scores + mask).softmax(-1) @ v)
        return x_BTD + self.down(F.gelu(self.odd(F.gelu(self.up(self.norm2(x_BTD))))))


class Zoo(nn.Module):
    """Tied embedding, LayerNorms, a 4-D convolution, a 7×13 matrix, 3-D and one-element parameters, odd biases, a frozen layer, a
    persistent and a non-persistent buffer; with ``unused`` a parameter that never gets a gradient."""

    def __init__(self, seed: int, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv2d(1, 3, (3, 2), padding=(1, 0))
        self.mix = nn.Parameter(torch.empty(2, 3, 5))
        self.gain = nn.Parameter(torch.empty(1))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.weight.requires_grad_(False)
        if unused:
            self.unused = nn.Parameter(torch.empty(5, 3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # every value depends on the seed, norms and biases too
            for tensor in [*self.parameters(), self.shift]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (1.0 if tensor.ndim == 1 else 0.0))

    shift: torch.Tensor

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(ids_BT[:, :-1])
        c_BT = self.conv(x_BTD.unsqueeze(1)).mean((1, 3))
        x_BTD = x_BTD * self.gain + c_BT.unsqueeze(-1) + self.mix.sum() + self.shift.sum()
        x_BTD = x_BTD + 0.1 * self.frozen(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits = self.head(self.norm(x_BTD)).float()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), ids_BT[:, 1:].reshape(-1))


def batch(step: int, rank: int, world_size: int) -> torch.Tensor:
    ids_BT = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 + step))
    return ids_BT.chunk(world_size)[rank]


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": [p for p in trainable if p.ndim < 2], "lr": 1e-3, "weight_decay": 0.0},
    ]


@dataclass
class Trained:
    """A model under an engine: ``member`` is what a Checkpointer takes."""

    member: Any
    module: nn.Module
    step: Any  # (step number) -> this rank's loss

    def global_loss(self, number: int) -> float:
        loss = self.step(number).detach().double()
        dist.all_reduce(loss)
        return (loss / dist.get_world_size()).item()

    def whole_parameters(self) -> dict[str, torch.Tensor]:
        """Gathered by the engine's own means, to check the checkpoint against. Every rank calls this."""
        found = {}
        named: Any = self.module.named_parameters()
        for name, p in named:
            with _gathered(p):
                found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        return found

    def close(self) -> None:
        if hasattr(self.member, "destroy"):
            self.member.destroy()


def _gathered(parameter: Any) -> contextlib.AbstractContextManager:
    if not hasattr(parameter, "ds_tensor"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)


def build(engine: str, seed: int, *, dtype: str = "fp32", unused: bool = False, accumulation: int = 1, zero: dict[str, Any] | None = None) -> Trained:
    """``engine`` is one of ENGINES, ``zero1_master`` for BF16_Optimizer. All ranks of the default group call this.

    bf16: mixed precision with fp32 masters everywhere; DeepSpeed keeps frozen parameters and buffers in bf16.
    """
    model = Zoo(seed, unused)
    if engine.startswith("zero"):
        return _deepspeed(model, engine, dtype, accumulation, zero or {})
    return _plain(model, engine, dtype, unused, accumulation)


def _plain(model: Zoo, engine: str, dtype: str, unused: bool, accumulation: int) -> Trained:
    forward: Any = model
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if dtype == "bf16" else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    elif engine == "ddp":
        forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    elif engine != "single":
        raise ValueError(f"no engine {engine}")
    optimizer = torch.optim.AdamW(param_groups(model), betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up)
    autocast = dtype == "bf16" and engine != "fsdp2"

    def step(number: int) -> torch.Tensor:
        total = torch.zeros(())
        for ids in batch(number, dist.get_rank(), dist.get_world_size()).chunk(accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = forward(ids) / accumulation
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    return Trained((forward, optimizer, scheduler), model, step)


def _deepspeed(model: Zoo, engine: str, dtype: str, accumulation: int, zero: dict[str, Any]) -> Trained:
    import deepspeed

    stage = int(engine[4])
    options: dict[str, Any] = {"stage": stage, **zero}
    if stage == 3:
        options |= {
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 700,
            "stage3_prefetch_bucket_size": 200,
            "stage3_max_live_parameters": 1000,
        }
        options["memory_efficient_linear"] = False  # it replaces F.linear for the whole process
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": options,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if engine.endswith("_master"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    optimizer = torch.optim.AdamW(param_groups(model), betas=(0.9, 0.95))
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up)
    with warnings.catch_warnings(), open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        warnings.simplefilter("ignore")
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False)

    def step(number: int) -> torch.Tensor:
        total = torch.zeros(())
        for ids in batch(number, dist.get_rank(), dist.get_world_size()).chunk(accumulation):
            loss = wrapped(ids)
            wrapped.backward(loss)
            wrapped.step()
            total += loss.detach() / accumulation
        return total

    return Trained(wrapped, model, step)


def _warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)
