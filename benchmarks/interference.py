"""How much slower training gets while saves go on in the background: two ranks with 256 MiB of FSDP2 state each.

A step is a forward, backward and all-reduce of at least 100 ms. A block of 50 steps begins with a save, which is awaited at the
block's end; blocks with and without saves, and with DCP's async_save by a thread, take turns. Ratios are steps a second over those
of the same round's block without saves, median of the rounds.
"""

import os
import shutil
import tempfile
import time

import torch.distributed as dist

from benchmarks import savers
from benchmarks.harness import Result, Row, main, median
from benchmarks.pool import Pool
from benchmarks.training import Trunk, quiet, slowest, under_fsdp2, weights_of


def measure_rank(folder: str, mebibytes: int, step_seconds: float, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each block, by what saved in it."""
    quiet()
    trunk, member = Trunk(step_seconds), under_fsdp2(weights_of(mebibytes))
    compared = {"none": None, "ours": savers.Ours(f"{folder}/ours", member), "dcp": savers.DcpThread(f"{folder}/dcp", member)}
    for saver in compared.values():
        _block(trunk, saver, 2)
    found: dict[str, list[float]] = {name: [] for name in compared}
    for i in range(rounds):
        for name in list(compared)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(_block(trunk, compared[name], steps))
    for saver in compared.values():
        if saver:
            saver.close()
    return found


def _block(trunk: Trunk, saver: savers.Saver | None, steps: int) -> float:
    if saver:
        saver.change()
    dist.barrier()
    began = time.perf_counter()
    if saver:
        saver.save()
    for _ in range(steps):
        trunk.step()
    if saver:
        saver.wait()
    seconds = time.perf_counter() - began
    if saver:
        saver.clean()
    return slowest(seconds)


def measure(quick: bool) -> Result:
    steps, folder, pool = 10 if quick else 50, tempfile.mkdtemp(prefix="lockstep_interference_"), Pool(2, 600.0)
    try:
        found = pool.run(measure_rank, os.path.join(folder, "runs"), 16 if quick else 256, 0.02 if quick else 0.1, steps, 1 if quick else 5)[0]
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    rate = {name: steps / median(values) for name, values in found.items()}
    rows: list[Row] = [
        {"saves": name, "steps_a_second": rate[name], "least": steps / max(values), "most": steps / min(values)} for name, values in found.items()
    ]
    return rows, {
        "steps_ratio": median(none / ours for none, ours in zip(found["none"], found["ours"], strict=True)),
        "steps_ratio_dcp": median(none / dcp for none, dcp in zip(found["none"], found["dcp"], strict=True)),
        "step_ms": 1000 / rate["none"],
    }


if __name__ == "__main__":
    main(measure, __doc__)
