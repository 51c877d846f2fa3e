"""How long training waits for a save: two ranks with 512 MiB of state each, under FSDP2, while a small trunk steps.

``blocked`` is the time in ``save()`` (which includes any wait for an earlier one) and by how much the next five steps together
exceed five usual ones; the slower rank's, median of interleaved rounds. Each save is durable before the next measurement begins;
that wait, with nothing to train, is not counted. Against it: one copy of the state into memory that is there, by both ranks at
once; DCP's async_save by a thread and by a process; dcp.save; and DeepSpeed's save_checkpoint of a ZeRO-1 engine with the same
parameters, whose partition holds as many bytes a rank. ``first`` and ``second`` are the first saves of a fresh Checkpointer,
``call`` is what ``save()`` itself took, ``durable`` from the call to the durable checkpoint, those five steps included.

--tiny: by how much the slowest step of a run with saves exceeds the slowest of a run without, for 10,000 small tensors. A save
every 20 steps, its time counted to its step; the earlier one is awaited if it is still in flight. For DCP, which takes longer, one
save, and steps until it has ended. Each run begins without the garbage of the one before.
"""

import gc
import shutil
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import savers
from benchmarks.harness import Result, Row, main, median
from benchmarks.pool import Pool
from benchmarks.training import Trunk, Weights, quiet, slowest, under_fsdp2, under_zero, weights_of

_NEXT_STEPS = 5
_TIMEOUT_SECONDS = 600.0


def measure_rank(folder: str, mebibytes: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round, by what was measured: ``blocked`` and, after an underscore, until it was durable."""
    quiet()
    trunk, member = Trunk(), under_fsdp2(weights_of(mebibytes))
    compared: dict[str, savers.Saver] = {
        "ours": savers.Ours(f"{folder}/ours", member),
        "memcpy": savers.Memcpy(member),
        "dcp_thread": savers.DcpThread(f"{folder}/thread", member),
        "dcp_process": savers.DcpProcess(f"{folder}/process", member),
        "dcp_save": savers.Dcp(f"{folder}/dcp", member),
        "deepspeed": savers.DeepSpeed(f"{folder}/deepspeed", under_zero(weights_of(mebibytes), torch.ones(1))),
    }
    for saver in compared.values():  # nobody's first save is measured here
        _blocked(saver, trunk)
    found: dict[str, list[float]] = {"step": []}
    for i in range(rounds):
        for name in list(compared)[:: 1 if i % 2 == 0 else -1]:
            found["step"].append(trunk.usual())
            blocked, call, durable = _blocked(compared[name], trunk)
            found.setdefault(name, []).append(blocked)
            if name != "memcpy":
                found.setdefault(f"{name}_call", []).append(call)
                found.setdefault(f"{name}_durable", []).append(durable)
    for saver in compared.values():
        saver.close()
    return found | _first_saves(folder, member, trunk, rounds)


def _first_saves(folder: str, member: Any, trunk: Trunk, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"attach": [], "first": [], "second": []}
    for i in range(rounds):
        fresh = savers.Ours(f"{folder}/fresh{i}", member)
        found["attach"].append(slowest(fresh.attach_seconds))
        found["first"].append(_blocked(fresh, trunk)[0])
        found["second"].append(_blocked(fresh, trunk)[0])
        fresh.close()
    return found


def _blocked(saver: savers.Saver, trunk: Trunk) -> tuple[float, float, float]:
    """Seconds: how long training was blocked, of that in the call, and until the save was durable."""
    saver.change()
    usual = trunk.usual()
    dist.barrier()
    began = time.perf_counter()
    saver.save()
    call = time.perf_counter() - began
    excess = sum(trunk.step() for _ in range(_NEXT_STEPS)) - _NEXT_STEPS * usual
    blocked = call if isinstance(saver, savers.Memcpy) else call + max(0.0, excess)
    saver.wait()
    durable = time.perf_counter() - began
    saver.clean()
    return slowest(blocked), slowest(call), slowest(durable)


def measure(quick: bool) -> Result:
    found = _on_two_ranks(measure_rank, 32 if quick else 512, 1 if quick else 5)
    seconds = {name: median(values) for name, values in found.items()}
    rows: list[Row] = []
    for name, values in found.items():
        if not name.endswith(("_call", "_durable")):
            rows.append({"what": name, "blocked_seconds": seconds[name], "least": min(values), "most": max(values)})
            rows[-1] |= {f"{part}_seconds": seconds.get(f"{name}_{part}", "") for part in ("call", "durable")}
    return rows, {
        "blocked_over_memcpy": seconds["ours"] / seconds["memcpy"],
        "blocked_over_dcp_thread": seconds["ours"] / seconds["dcp_thread"],
        "blocked_over_dcp_process": seconds["ours"] / seconds["dcp_process"],
        "blocked_over_dcp_save": seconds["ours"] / seconds["dcp_save"],
        "blocked_over_deepspeed": seconds["ours"] / seconds["deepspeed"],
        "first_over_second_save": seconds["first"] / seconds["second"],
        "attach_seconds": seconds["attach"],
        "call_over_memcpy": seconds["ours_call"] / seconds["memcpy"],
        "blocked_seconds": seconds["ours"],
        "memcpy_seconds": seconds["memcpy"],
    }


# ---------------------------------------------------------------------- tiny


def measure_tiny_rank(folder: str, tensors: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Of each round the slowest step, in ms, by the state and what saved it."""
    quiet()
    trunk, count = Trunk(), tensors // 4
    fsdp2, zero1 = under_fsdp2(Weights(count, (256,))), under_zero(Weights(count, (256,)), torch.ones(1))
    ours = {"fsdp2": savers.Ours(f"{folder}/fsdp2", fsdp2), "zero1": savers.Ours(f"{folder}/zero1", zero1)}
    dcp = savers.DcpThread(f"{folder}/dcp", fsdp2)
    runs = {name: lambda saver=saver: _worst_step(trunk, saver, steps) for name, saver in ours.items()}
    runs |= {"none": lambda: _worst_step(trunk, None, steps), "dcp": lambda: _worst_step_of_one_save(trunk, dcp)}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(1000 * runs[name]())
    for saver in (*ours.values(), dcp):
        saver.close()
    return found


def _worst_step(trunk: Trunk, saver: savers.Saver | None, steps: int) -> float:
    gc.collect()  # others' garbage
    dist.barrier()
    worst = 0.0
    for i in range(steps):
        if saver and i % 20 == 0:
            saver.change()
        began = time.perf_counter()
        if saver and i % 20 == 0:
            saver.wait()
            saver.save()
        trunk.step()
        worst = max(worst, time.perf_counter() - began)
    if saver:
        saver.wait()
        saver.clean()
    return slowest(worst)


def _worst_step_of_one_save(trunk: Trunk, saver: savers.DcpThread) -> float:
    saver.change()
    gc.collect()
    dist.barrier()
    began = time.perf_counter()
    saver.save()
    trunk.step()
    worst = time.perf_counter() - began
    while slowest(0.0 if saver.is_done() else 1.0):
        worst = max(worst, trunk.step())
    saver.wait()
    saver.clean()
    return slowest(worst)


def measure_tiny(quick: bool) -> Result:
    found = _on_two_ranks(measure_tiny_rank, 400 if quick else 10_000, 40 if quick else 200, 1 if quick else 5)
    worst = {name: median(values) for name, values in found.items()}
    rows = [{"what": name, "worst_step_ms": worst[name], "least": min(values), "most": max(values)} for name, values in found.items()]
    return rows, {
        "tiny_worst_step_ms": max(worst["fsdp2"], worst["zero1"]) - worst["none"],
        "tiny_worst_step_ms_dcp": worst["dcp"] - worst["none"],
    }


def _on_two_ranks(job: Any, *args: Any) -> dict[str, list[float]]:
    """Both ranks find the same: every figure is the slower one's."""
    pool, folder = Pool(2, _TIMEOUT_SECONDS), tempfile.mkdtemp(prefix="lockstep_stall_")
    try:
        return pool.run(job, folder, *args)[0]
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(measure, __doc__, tiny=measure_tiny)
