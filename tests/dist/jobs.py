"""What the ranks do in the distributed tests: importable, so that worker processes find it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.zoo import Trained, build
from engine import Progress
from engine.storage import LocalStorage
from tests.now import Checkpointer

warnings.simplefilter("ignore")


@contextlib.contextmanager
def trained(engine: str, seed: int = 0, steps: int = 0, **options: Any):
    made = build(engine, seed, **options)
    try:
        for number in range(steps):
            made.step(number)
        yield made
    finally:
        made.close()


def told(act: Any) -> str:
    """The class and message of the error that ``act`` raises; empty if it raises none."""
    try:
        act()
    except Exception as e:  # noqa: BLE001 - the failing rank keeps the error it met, whatever that is
        return f"{type(e).__name__}: {e}"
    return ""


def moments(made: Trained) -> dict[str, torch.Tensor]:
    """Whole first moments by the engine's own means. Every rank calls this."""
    found = {}
    for name, p in made.module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_tensor"):
            from deepspeed.utils import safe_get_full_optimizer_state

            value = safe_get_full_optimizer_state(p, "exp_avg")
        else:
            value = made.member[1].state[p]["exp_avg"]
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return found


# ---------------------------------------------------------------- through DCP


def save_counting_dcp(engine: str, run: str) -> dict[str, Any]:
    """Which of DCP's entry points a save and a resume pass, and what is written when dcp.save does nothing."""
    calls: list[str] = []
    real_save, real_load = dcp.save, dcp.load

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{name}:{type(kwargs.get('storage_writer') or kwargs.get('storage_reader')).__name__}:{type(kwargs['planner']).__name__}")
            return real(*args, **kwargs)

        return call

    with trained(engine, steps=1) as made:
        checkpointer = Checkpointer(run, made.member)
        try:
            dcp.save, dcp.load = counted("save", real_save), counted("load", real_load)
            folder = checkpointer.save(Progress(step=1))
            checkpointer.resume("latest")
            dcp.save = lambda *args, **kwargs: None
            without = ""
            try:
                checkpointer.save(Progress(step=2))
            except Exception as e:  # noqa: BLE001 - any: the pipeline misses its index
                without = type(e).__name__
        finally:
            dcp.save, dcp.load = real_save, real_load
    return {"calls": calls, "files": sorted(os.listdir(folder)), "without_dcp": without}


def save_for_stock(engine: str, run: str) -> None:
    """A checkpoint, and beside it what stock PyTorch should find in it, gathered by the engine's own means."""
    with trained(engine, steps=2) as made:
        Checkpointer(run, made.member).save(Progress(step=2))
        expected = {f"model.{k}": v for k, v in made.whole_parameters().items()}
        expected |= {f"optim.state.{k}.exp_avg": v for k, v in moments(made).items()}
        losses = [made.global_loss(2 + i) for i in range(2)]
    if dist.get_rank() == 0:
        torch.save({"tensors": expected, "losses": losses}, f"{run}/expected.pt")


# ---------------------------------------------------------------- state


def save_then_continue(engine: str, run: str, steps: int, options: dict[str, Any], more: int = 2) -> list[float]:
    with trained(engine, 0, steps, **options) as made:
        Checkpointer(run, made.member).save(Progress(step=steps, samples=steps * 12))
        return [made.global_loss(steps + i) for i in range(more)]


def resume_then_continue(
    engine: str, run: str, steps: int, options: dict[str, Any], own_steps: int = 1, more: int = 2, **resume: Any
) -> dict[str, Any]:
    with trained(engine, 1, own_steps, **options) as made:
        checkpointer = Checkpointer(run, made.member)
        progress = checkpointer.resume("latest", **resume)
        return {
            "progress": (progress.step, progress.samples),
            "difference": checkpointer.max_difference(),
            "losses": [made.global_loss(steps + i) for i in range(more)],
        }


def hyper_parameters_after_resume(engine: str, run: str) -> dict[str, list[float]]:
    """Saved with other learning rates than the target's: lr and weight decay of each group after the load."""
    with trained(engine, 1) as made:
        checkpointer = Checkpointer(run, made.member)
        checkpointer.resume("latest")
        optimizer = next(iter(checkpointer._members.models.values())).adapter.parts[0].optimizer
        assert optimizer is not None
        return {key: [group[key] for group in optimizer.param_groups] for key in ("lr", "weight_decay", "betas")}


def counters_after_resume(engine: str, run: str) -> dict[str, int]:
    with trained(engine, 1) as made:
        Checkpointer(run, made.member).resume("latest")
        return {name: getattr(made.member, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")}


def save_inside_accumulation(engine: str, run: str) -> dict[str, Any]:
    """A save between two micro-batches, which the forward after the boundary carries out; and what a resume finds."""
    from benchmarks.zoo import batch

    with trained(engine, accumulation=2) as made:
        first, second = batch(1, dist.get_rank(), dist.get_world_size()).chunk(2)
        checkpointer, progress = Checkpointer(run, made.member), Progress()
        made.step(0)
        progress.advance(12)
        for micro in (first, second):
            made.member.backward(made.member(micro))
            made.member.step()
            if micro is first:
                answer = checkpointer.save(progress)
        progress.advance(12)
        before = sorted(os.listdir(run)) if os.path.exists(run) else []
        made.step(2)  # its forward saves first
        seen = sorted(name for name in os.listdir(run) if name.startswith("step_"))
        checkpointer.resume("latest")
        after = made.step(2)
        with trained(engine, accumulation=2) as fresh:
            fresh.step(0)
            fresh.step(1)
            expected = fresh.step(2)
        return {"answer": answer, "before": before, "seen": seen, "losses": (after, expected)}


def resume_inside_accumulation(engine: str, run: str) -> str:
    from benchmarks.zoo import batch

    with trained(engine, accumulation=2) as made:
        checkpointer = Checkpointer(run, made.member)
        checkpointer.save(Progress(step=1))
        made.member.backward(made.member(batch(1, dist.get_rank(), dist.get_world_size()).chunk(2)[0]))
        made.member.step()
        return told(lambda: checkpointer.resume("latest"))


def attach_after_change(engine: str, run: str) -> str:
    """Weights loaded after deepspeed.initialize, which DeepSpeed's masters do not see."""
    with trained(engine) as made:
        for p in made.module.parameters():
            if p.requires_grad:
                (p.ds_tensor if hasattr(p, "ds_tensor") else p).data.add_(1.0)
        return told(lambda: Checkpointer(run, made.member))


def attach_to_other_order(run: str) -> str:
    """A DeepSpeed that lays its flat buffers out in another order than this version knows."""
    with trained("zero1") as made:
        wrapper = made.member.optimizer
        wrapper.round_robin_bit16_groups[0] = list(reversed(wrapper.round_robin_bit16_groups[0]))
        return told(lambda: Checkpointer(run, made.member))


def stored_names(engine: str, run: str, unused: bool = False) -> list[str]:
    with trained(engine, steps=1, unused=unused) as made:
        checkpointer = Checkpointer(run, made.member)
        checkpointer.save(Progress(step=1))
        assert checkpointer._plans.last is not None
        return [tensor.name for tensor in checkpointer._plans.last.assigned]


def marks(engine: str) -> set[str]:
    """What shows that a variant of the zoo is what it is called: how DTensors are placed, classes of modules, and more."""
    torch._dynamo.utils.counters.clear()
    with trained(engine, steps=2) as made:
        parameters: list[Any] = list(made.module.parameters())
        found = {" ".join(type(placement).__name__ for placement in p.placements) for p in parameters if hasattr(p, "placements")}
        found |= {type(module).__name__ for module in made.module.modules()}
        if any(getattr(p, "ds_secondary_tensor", None) is not None for p in parameters):
            found.add("second copies")
        if hasattr(made.member, "zero_offload_optimizer") and made.member.zero_offload_optimizer():
            found.add("offloaded")
    if torch._dynamo.utils.counters["frames"]["ok"]:
        found.add("compiled")
    return found


# ---------------------------------------------------------------- random state


def save_and_draw(run: str) -> tuple[float, float, float]:
    torch.manual_seed(1)
    model = nn.Linear(3, 3)
    torch.manual_seed(100 + dist.get_rank())
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    Checkpointer(run, model).save(Progress(step=1))
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def resume_and_draw(run: str) -> tuple[float, float, float]:
    torch.manual_seed(999)
    Checkpointer(run, nn.Linear(3, 3)).resume("latest")
    return torch.rand(()).item(), random.random(), float(np.random.rand())


# ---------------------------------------------------------------- faults


def save_with_a_failing_rank(run: str, failing: int, call: str) -> dict[str, Any]:
    """Step 1 is sound; at step 2 one storage call of one rank fails; step 3 is sound again."""
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=20)
        checkpointer.save(Progress(step=1))
        with _failing(call, dist.get_rank() == failing):
            error = told(lambda: checkpointer.save(Progress(step=2)))
        dist.barrier()
        after = sorted(os.listdir(run))
        dist.barrier()
        checkpointer.save(Progress(step=3))
        return {"error": error, "after": after}


@contextlib.contextmanager
def _failing(call: str, active: bool):
    real = getattr(LocalStorage, call)

    def refuse(self: LocalStorage, *args: Any) -> Any:
        raise OSError(28, "No space left on device") if call == "sync_folder" else RuntimeError("the disk is on fire")

    try:
        if active:
            setattr(LocalStorage, call, refuse)
        yield
    finally:
        setattr(LocalStorage, call, real)


def save_and_die(run: str, dying: int) -> str:
    """One rank is killed while it writes; the others get an error within the timeout."""
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=3)
        checkpointer.save(Progress(step=1))
        if dist.get_rank() == dying:
            LocalStorage.create = lambda self, *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign,return-value]
        return told(lambda: checkpointer.save(Progress(step=2)))


def disagree(run: str) -> dict[str, str]:
    """Ranks that save different steps, and ranks that save different tensors."""
    rank = dist.get_rank()
    steps = told(lambda: Checkpointer(run, nn.Linear(2, 2)).save(Progress(step=rank)))
    shapes = told(lambda: Checkpointer(run, nn.Linear(2, 2 + rank)).save(Progress(step=1)))
    return {"steps": steps, "shapes": shapes}


def resume_with_one_blind_rank(run: str) -> str:
    """One rank cannot read a shard that it needs."""
    with trained("fsdp2", steps=0) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=20)
        with _failing("open", dist.get_rank() == 1):
            return told(lambda: checkpointer.resume("latest"))


# ---------------------------------------------------------------- what engines do between


def resume_while_gathered(run: str) -> dict[str, Any]:
    """FSDP2 leaves the root gathered after a forward without gradient: a resume must not leave the old weights in use."""
    with trained("fsdp2", 0, 1) as made:
        from benchmarks.zoo import batch

        checkpointer = Checkpointer(run, made.member)
        checkpointer.save(Progress(step=1))
        ids = batch(50, dist.get_rank(), dist.get_world_size())
        with torch.no_grad():
            saved = made.module(ids).item()
        made.step(1)
        with torch.no_grad():
            moved = made.module(ids).item()
        checkpointer.resume("latest")
        with torch.no_grad():
            resumed = made.module(ids).item()
        attached = Checkpointer(run, made.member)  # attaching in that state finds the sharded parameters too
        return {"saved": saved, "moved": moved, "resumed": resumed, "engine": attached._members.models[""].adapter.engine}


def records_that_differ(run: str) -> dict[str, str]:
    """Values that ranks should share and do not."""
    rank = dist.get_rank()

    class Position:
        def state_dict(self) -> dict[str, int]:
            return {"at": 100 * rank}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    model = nn.Linear(2, 2)
    lr = torch.optim.SGD(model.parameters(), lr=0.1 * (rank + 1))
    return {
        "member": told(lambda: Checkpointer(run, model, loader=Position()).save(Progress(step=1))),
        "lr": told(lambda: Checkpointer(run, (model, lr)).save(Progress(step=1))),
        "metric": told(lambda: Checkpointer(run, model).save(Progress(step=1), metrics={"loss": 1.0 if rank == 0 else None})),  # type: ignore[dict-item]
    }


def fsdp1(run: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return told(lambda: Checkpointer(run, FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))))


def frozen_zero3(run: str, seed: int, load: bool) -> list[float]:
    """ZeRO-3 without an optimizer: a reference model."""
    import deepspeed

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 8}}
    wrapped, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    checkpointer = Checkpointer(run, wrapped)
    if load:
        checkpointer.resume("latest")
        assert checkpointer.max_difference() == 0.0
    else:
        checkpointer.save(Progress(step=1))
    with torch.no_grad():
        out = wrapped(torch.ones(1, 6)).flatten().tolist()
    wrapped.destroy()
    return out


def how_torch_computes() -> tuple[str, int, bool]:
    """What decides how this process rounds, and in which order it takes sums."""
    from deepspeed.runtime.torch_autocast import is_autocast_initialized

    linear = torch.nn.functional.linear
    return f"{linear.__module__}.{linear.__qualname__}", torch.get_num_threads(), is_autocast_initialized()


def compute_differently(run: str) -> tuple[str, int, bool]:
    """Leave the process as ZeRO-3 with DeepSpeed's defaults does, and an engine with ``torch_autocast``, and with more threads."""
    from deepspeed.runtime import torch_autocast

    frozen_zero3(run, 0, False)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = True
    torch.set_num_threads(2)
    return how_torch_computes()


class LocalMomentum(torch.optim.Optimizer):
    """Keeps plain local tensors beside DTensor parameters, and counts steps in ints."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad._local_tensor
                state.setdefault("m", torch.zeros_like(grad)).mul_(0.9).add_(grad)
                state["step"] = state.get("step", 0) + 1
                p._local_tensor.sub_(state["m"], alpha=group["lr"] / state["step"])


def local_state(run: str, own_step: bool) -> dict[str, Any]:
    """An optimizer that works on local shards: each rank gets its own back, and ints stay ints."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build_one(seed: int) -> tuple[nn.Module, LocalMomentum]:
        torch.manual_seed(seed)
        model = nn.Linear(6, 5)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, LocalMomentum(model.parameters())

    def train(model: nn.Module, optimizer: LocalMomentum) -> float:
        loss = model(torch.ones(2, 6)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    model, optimizer = build_one(0)
    train(model, optimizer)
    Checkpointer(run, (model, optimizer)).save(Progress(step=1))
    reference = [train(model, optimizer) for _ in range(2)]
    model, optimizer = build_one(1)
    if own_step:
        train(model, optimizer)
    Checkpointer(run, (model, optimizer)).resume("latest")
    return {
        "reference": reference,
        "losses": [train(model, optimizer) for _ in range(2)],
        "step": type(optimizer.state[model.weight]["step"]).__name__,
    }
