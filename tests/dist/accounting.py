"""What ranks do in the tests of accounting: state that is not laid out by parameter, on several ranks."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engine import PerRank, Progress
from tests.dist.jobs import told
from tests.now import Checkpointer

warnings.simplefilter("ignore")


class Net(nn.Module):
    """``kept`` is extra state of each rank's own; ``none`` has no elements."""

    def __init__(self, empty: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.kept: dict[str, Any] = {"amax": 0.0, "history": torch.zeros(3)}
        if empty:
            self.none = nn.Linear(16, 0, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = {"amax": max(self.kept["amax"], x.abs().max().item()), "history": self.kept["history"] + x.detach().mean()}
        hidden = torch.tanh(self.first(x))
        extra = self.none(hidden).sum() * 0 if hasattr(self, "none") else 0.0
        return self.last(hidden / (1 + self.kept["amax"])).square().mean() + extra

    def get_extra_state(self) -> dict[str, Any]:
        return self.kept

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.kept = state


class Odd(torch.optim.Optimizer):
    """Counts in its groups, in a ``(1,)`` tensor and under a key of its own; keeps a list of states."""

    def __init__(self, params: Any, lr: float = 0.01, nested: bool = True) -> None:
        super().__init__(params, {"lr": lr})
        self.nested = nested

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("step", torch.zeros(1)).add_(1)
                momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                if self.nested:
                    momentum = state.setdefault("slow", [torch.zeros_like(p), 0.5])[0].lerp_(momentum, 0.3)
                p.sub_(momentum, alpha=group["lr"] / float(state["step"]) / self.state["calls"] * group["step"])


class Average:
    """Of DTensors under FSDP2, made at the first update only."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mean = module, dict[str, torch.Tensor]()

    def update(self) -> None:
        for name, p in self.module.named_parameters():
            self.mean[name] = p.detach().clone() if name not in self.mean else self.mean[name].lerp_(p.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class Replay:
    """A buffer of each rank's own, of its own size."""

    def __init__(self, rank: int, filled: bool) -> None:
        sizes = (30_000 * (rank + 1), 3) if filled else (1,)
        self.buffers = [torch.randn(size, generator=torch.Generator().manual_seed(rank)) for size in sizes]
        self.at = rank + 10 if filled else 0

    def state_dict(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffers, self.at = state["buffers"], state["at"]


def build(engine: str, seed: int, *, empty: bool = False, optimizer: str = "odd", **config: Any) -> tuple[Any, Any]:
    """A member and a function that takes a step with this rank's batch and returns the loss."""
    torch.manual_seed(seed)
    net = Net(empty)
    rank = dist.get_rank()

    def batch(number: int) -> torch.Tensor:
        return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + rank))

    if engine.startswith("zero"):
        import deepspeed

        stage = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": stage, "zero_allow_untested_optimizer": True, **config}
        given = {"optimizer": Odd(net.parameters(), nested=False)} if optimizer == "odd" else {}
        if optimizer != "odd":
            settings["optimizer"] = {"type": optimizer, "params": {"lr": 1e-2}}
        made = deepspeed.initialize(model=net, config=settings, **given)[0]

        def step(number: int) -> float:
            loss = made(batch(number))
            made.backward(loss)
            made.step()
            return loss.item()

        return made, step
    if engine == "fsdp2":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    module = DistributedDataParallel(net) if engine == "ddp" else net
    optim = Odd(net.parameters()) if optimizer == "odd" else torch.optim.AdamW(net.parameters(), lr=1e-2)

    def step(number: int) -> float:
        loss = module(batch(number))
        loss.backward()
        optim.step()
        optim.zero_grad()
        return loss.item()

    return (module, optim), step


def _net(member: Any) -> Any:
    module = member[0] if isinstance(member, tuple) else member
    return getattr(module, "module", module)


def save(engine: str, run: str, options: dict[str, Any], objects: bool = False) -> list[float]:
    """Three steps, a save, and the losses of two more."""
    member, step = build(engine, 0, **options)
    for number in range(3):
        step(number)
    Checkpointer(run, member, timeout_seconds=60, **_objects(member, True) if objects else {}).save(Progress(step=3))
    return [step(number) for number in (3, 4)]


def _objects(member: Any, filled: bool) -> dict[str, Any]:
    average = Average(_net(member))
    if filled:
        average.update()
    return {"average": average, "replay": PerRank(Replay(dist.get_rank(), filled))}


def resume(engine: str, run: str, options: dict[str, Any], objects: bool = False, **how: Any) -> dict[str, Any]:
    """A resume into what has trained before, and the losses of two more steps."""
    member, step = build(engine, 1, **options)
    step(0)
    held = _objects(member, False) if objects else {}
    Checkpointer(run, member, timeout_seconds=60, **held).resume(verify="all", **how)
    found: dict[str, Any] = {"losses": [step(number) for number in (3, 4)]}
    if objects:
        replay, expected = held["replay"].target, Replay(dist.get_rank(), True)
        found["replay"] = replay.at == expected.at and all(map(torch.equal, replay.buffers, expected.buffers))
        mean = held["average"].mean
        found["placements"] = sorted({str(value.placements) if isinstance(value, DTensor) else "plain" for value in mean.values()})
    return found


def scale_goes_on(run: str, stage: int) -> list[Any]:
    """DeepSpeed's own scaler of ``torch_autocast`` in fp16, before a save and after the resume."""
    member, step = build(f"zero{stage}", 0, optimizer="AdamW", torch_autocast={"enabled": True, "dtype": "float16"})
    scaler = member.optimizer.torch_autocast_gradscaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
    for number in range(4):
        step(number)
    Checkpointer(run, member, timeout_seconds=60).save(Progress(step=4))
    fresh, _ = build(f"zero{stage}", 1, optimizer="AdamW", torch_autocast={"enabled": True, "dtype": "float16"})
    Checkpointer(run, fresh, timeout_seconds=60).resume()
    return [dict(scaler.state_dict()), dict(fresh.optimizer.torch_autocast_gradscaler.state_dict())]


def micro_steps(run: str) -> dict[int, int]:
    """Of a run that has accumulated over different numbers of micro-batches, after a resume, by its accumulation."""
    member, step = build("zero1", 0, optimizer="AdamW", gradient_accumulation_steps=2)
    for number in range(4):
        step(number)
    member.micro_steps = 10  # of two steps: the first had accumulated over eight
    Checkpointer(run, member, timeout_seconds=60).save(Progress(step=2))
    found = {}
    for accumulation in (2, 4):
        fresh, _ = build("zero1", 1, optimizer="AdamW", gradient_accumulation_steps=accumulation)
        Checkpointer(run, fresh, timeout_seconds=60).resume()
        found[accumulation] = fresh.micro_steps
    return found


def refusals(run: str) -> dict[str, str]:
    """What cannot be saved on these ranks, and what is said of it."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, str] = {}
    with torch.device("meta"):
        meta = Net()
    fully_shard(meta, mesh=mesh)
    found["meta"] = told(lambda: Checkpointer(f"{run}/meta", meta))

    net = DistributedDataParallel(Net())
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found["zero redundancy"] = told(lambda: Checkpointer(f"{run}/zro", (net, ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-2))))

    sharded, other = Net(), Net()
    fully_shard(sharded, mesh=mesh)
    fully_shard(other, mesh=mesh)
    checkpointer = Checkpointer(f"{run}/assign", sharded)
    sharded.load_state_dict(other.state_dict(), assign=True)
    found["assigned"] = told(lambda: checkpointer.save(Progress(step=1)))

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    muon, step = build("zero2", 0, optimizer="Muon")
    found["muon"] = told(lambda: Checkpointer(f"{run}/muon", muon))
    nested, nested_step = build("zero1", 0)
    nested.optimizer.optimizer.nested = True
    Checkpointer(f"{run}/nested", nested)
    found["nested"] = told(lambda: nested_step(0))
    return found
