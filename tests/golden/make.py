"""Makes tests/golden/format_0 anew: ``python -m tests.golden.make``. Two real ranks, DeepSpeed and FSDP2, saved by a Checkpointer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import ElasticSampler, Progress
from engine.format.manifest import FORMAT
from tests.now import Checkpointer

HERE = Path(__file__).parent
RUN = HERE / f"format_{FORMAT}"
EXPECTED = "expected.json"
BASE, ROWS, WIDTH = 2, 5, 4
LR = {"generator": 0.01, "critic": 0.02}


class Rows(nn.Module):
    """An embedding of ``ROWS`` rows of which ``BASE`` are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(BASE, WIDTH), requires_grad=False)
        self.trainable = nn.Parameter(torch.randn(ROWS - BASE, WIDTH))
        self.row_parts = {"weight": ("frozen", "trainable")}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.frozen, self.trainable])[ids]


class Generator(nn.Module):
    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.out = embed, nn.Linear(WIDTH, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    scale: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.out(self.embed(ids)) * self.scale).square().mean()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(3, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(x).square().mean()


class Average:
    """A member that is no model."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"decay": 0.99, "updates": 0, "shadow": torch.zeros(2, 3)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def sampler() -> ElasticSampler:
    return ElasticSampler(range(100), global_batch_size=4, seed=3)


def train_and_save(run: str) -> dict[str, Any]:
    """On every rank. Returns what the checkpoint must hold, gathered by the engines."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    generator, critic, average = Generator(Rows()), Critic(), Average()
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 1}}
    trained = [p for p in generator.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=LR["generator"])
    zero, *_ = deepspeed.initialize(model=generator, optimizer=adamw, config={**config, "zero_allow_untested_optimizer": True})
    fully_shard(critic)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=LR["critic"], betas=(0.8, 0.99))
    data = sampler()
    members = {"generator": zero, "critic": (critic, optimizer), "average": average, "data": data}
    checkpointer = Checkpointer(run, config={"width": WIDTH}, monitor="val_loss", **members)
    progress = Progress()
    for step in range(2):
        zero.backward(zero(torch.tensor([step, 2 + step])))
        zero.step()
        critic(torch.ones(2, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.state = {"decay": 0.99, "updates": step + 1, "shadow": torch.full((2, 3), 0.5 * (step + 1))}
        progress.advance(samples=4)
    progress.epoch = 1
    checkpointer.save(progress, metrics={"val_loss": 0.25})
    tensors = {
        "generator.model.embed.weight": torch.cat([generator.embed.frozen, generator.embed.trainable]),
        "generator.model.out.weight": generator.out.weight,
        "generator.model.out.bias": generator.out.bias,
        "generator.buffers.scale": generator.scale,
        "critic.model.score.weight": critic.score.weight,
        "average.shadow": average.state["shadow"],
    }
    for key in ("exp_avg", "exp_avg_sq"):
        rows = safe_get_full_optimizer_state(generator.embed.trainable, key)
        tensors[f"generator.optim.state.embed.weight.{key}"] = torch.cat([torch.zeros(BASE, WIDTH), rows])
        tensors[f"generator.optim.state.out.weight.{key}"] = safe_get_full_optimizer_state(generator.out.weight, key)
        tensors[f"generator.optim.state.out.bias.{key}"] = safe_get_full_optimizer_state(generator.out.bias, key)
        tensors[f"critic.optim.state.score.weight.{key}"] = optimizer.state[critic.score.weight][key]
    for name in ("generator.optim.state.embed.weight", "generator.optim.state.out.weight", "generator.optim.state.out.bias"):
        tensors[f"{name}.step"] = torch.tensor(2.0)
    tensors["critic.optim.state.score.weight.step"] = torch.tensor(2.0)
    whole = {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().contiguous() for name, t in tensors.items()}
    zero.destroy()
    return {
        "progress": {"epoch": 1, "step": 2, "samples": 8, "metrics": {"val_loss": 0.25}},
        "config": {"width": WIDTH},
        "tensors": {name: {"shape": list(t.shape), "hex": t.reshape(-1).view(torch.uint8).numpy().tobytes().hex()} for name, t in whole.items()},
    }


def main() -> None:
    from benchmarks.pool import Pools

    shutil.rmtree(RUN, ignore_errors=True)
    pools = Pools()
    try:
        expected, _ = pools[2].run(train_and_save, str(RUN))
    finally:
        pools.close()
    (RUN / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
    files = [path for path in RUN.rglob("*") if path.is_file()]
    print(f"{RUN}: {len(files)} files, {sum(path.stat().st_size for path in files)} bytes")


if __name__ == "__main__":
    from tests.golden import make

    make.main()  # under its importable name: the ranks must find train_and_save
