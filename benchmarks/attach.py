"""What a checkpointer costs once, by the number of parameters: attach, the first and the second save, and a resume.

Small parameters of a few shapes under a Llama's names, with the state of one AdamW step, so that all
time is per parameter. A save is the call of ``save()``, which training waits for; resume is that of a
further Checkpointer of the same state, ``resume_unproven`` with ``verify="off"``. ``cpu`` are the process's seconds of CPU, which other load does
not change. Of ranks the slowest counts; each figure is the median of the rounds. ``reference`` is, in
the same process and with fsync, ``dcp.save`` of the state dicts, and ``save_checkpoint`` under ZeRO,
which writes flat buffers whole; the ratio is that of attach and first save to it.

--many: 50,000 parameters in one process.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import savers
from benchmarks.harness import Result, Row, main, median
from benchmarks.pool import Pool
from benchmarks.training import quiet, slowest, under_fsdp2, under_zero
from engine import Checkpointer, Progress

ENGINES = {"single": 1, "fsdp2": 2, "zero2": 2}
"""With how many ranks each is measured."""

_TIMEOUT_SECONDS = 1800.0
_SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (40, 16), "mlp.up_proj": (40, 16), "mlp.down_proj": (16, 40),
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
}  # fmt: skip


class Layers(nn.Module):
    """``count`` parameters, as many layers of a small Llama as they make."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for i in range(count):
            layer, leaf = divmod(i, len(_SHAPES))
            name, owner = list(_SHAPES)[leaf], self
            for part in ("layers", str(layer), *name.split(".")):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter("weight", nn.Parameter(torch.rand(_SHAPES[name])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(p.mean() for p in self.parameters())


def _member(engine: str, count: int) -> Any:
    model = Layers(count)
    if engine == "fsdp2":
        return under_fsdp2(model)
    if engine == "zero2":
        return under_zero(model, torch.ones(1), stage=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure_rank(folder: str, engine: str, count: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round, by what was measured."""
    quiet()
    member = _member(engine, count)
    reference = savers.DeepSpeed(f"{folder}/reference", member) if engine == "zero2" else savers.Dcp(f"{folder}/reference", member)
    found: dict[str, list[float]] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        gc.collect()
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        result = act()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        found.setdefault(name, []).append(slowest(seconds))
        found.setdefault(f"{name}_cpu", []).append(slowest(cpu_seconds))
        return result

    for i in range(rounds):
        run = f"{folder}/{i}"
        checkpointer = timed("attach", partial(Checkpointer, run, member))
        for step, name in ((1, "first"), (2, "second")):
            timed(name, partial(checkpointer.save, Progress(step=step)))
            checkpointer.wait()
        checkpointer.close()
        further = Checkpointer(run, member)
        timed("resume", further.resume)
        further.close()
        further = Checkpointer(run, member)
        timed("resume_unproven", partial(further.resume, verify="off"))
        further.close()
        timed("reference", reference.save)
        reference.clean()
    return found


def measure(quick: bool) -> Result:
    return _measure([(engine, 1000 if quick else 10_000) for engine in ENGINES], 1 if quick else 3)


def measure_many(quick: bool) -> Result:
    return _measure([("single", 5000 if quick else 50_000)], 1)


def _measure(cases: list[tuple[str, int]], rounds: int) -> Result:
    rows: list[Row] = []
    figures: dict[str, float] = {}
    for engine, count in cases:
        pool, folder = Pool(ENGINES[engine], _TIMEOUT_SECONDS), tempfile.mkdtemp(prefix="lockstep_attach_")
        try:
            seconds = {name: median(values) for name, values in pool.run(measure_rank, folder, engine, count, rounds)[0].items()}
        finally:
            pool.close()
            shutil.rmtree(folder, ignore_errors=True)
        once = seconds["attach"] + seconds["first"]
        ratio = once / seconds["reference"]
        rows.append({"engine": engine, "ranks": ENGINES[engine], "parameters": count, **seconds, "ratio": ratio})
        figures[f"{engine}_{count}_attach_and_first_ms_per_parameter"] = once * 1000 / count
        figures[f"{engine}_{count}_over_reference"] = ratio
        figures[f"{engine}_{count}_proof_of_resume"] = 1 - seconds["resume_unproven_cpu"] / seconds["resume_cpu"]
    return rows, figures


if __name__ == "__main__":
    main(measure, __doc__, many=measure_many)
