"""Save under each engine and world size, load under each other: bit-equal state, and the next two losses as promised.

What each cell must show is decided by :func:`expected`, before anything runs. A cell that shows anything else is unexpected.
"""

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import jobs
from benchmarks.harness import Result, Row, main
from benchmarks.pool import Pools, RankFailed
from benchmarks.zoo import ENGINES

WORLD_SIZES = (1, 2, 3, 4)
ZERO = ("zero1", "zero2", "zero3")

# Relative, over the two losses after the load. Gloo sums in another order above two ranks, and another world size cuts the batch
# differently; in bf16 the engines also round at different places.
FP32_TOLERANCE = 1e-6
BF16_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Config:
    engine: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.engine}×{self.world_size}"


@dataclass(frozen=True)
class Cell:
    source: Config
    target: Config
    dtype: str = "fp32"
    unused: bool = False


def expected(cell: Cell) -> float | str:
    """``"refused"``, or the largest relative difference allowed of the next two losses: 0.0 is bitwise."""
    source, target = cell.source, cell.target
    whole_optimizer = ("zero0", "fsdp2", "ddp", "single")
    if cell.unused and source.engine in whole_optimizer[1:] and target.engine in ZERO:
        return "refused"  # the unused parameter has no step count there, the others of its flat buffer have one
    if source == target:
        return 0.0
    if cell.dtype == "bf16":
        stages = source.engine in ZERO and target.engine in ZERO and source.world_size == target.world_size <= 2
        return 0.0 if stages else BF16_TOLERANCE
    return 0.0 if source.world_size == target.world_size <= 2 else FP32_TOLERANCE


def configs(engines: Iterable[str] = ENGINES) -> list[Config]:
    return [Config(e, w) for e in engines for w in WORLD_SIZES if e != "single" or w == 1]


def all_cells() -> list[Cell]:
    """fp32: every pair. bf16: each ordered pair of engines, the pairs of world sizes in turn, and each pair of world sizes at
    least once. An unused parameter: every ordered pair of engines at 1→2 and 2→1 ranks."""
    cells = [Cell(a, b) for a, b in itertools.product(configs(), configs())]
    return cells + bf16_cells() + unused_cells()


def bf16_cells() -> list[Cell]:
    pairs = list(itertools.product(WORLD_SIZES, WORLD_SIZES))
    sizes = itertools.cycle(pairs)
    cells = []
    for a, b in itertools.product((*ENGINES, "zero1_master"), repeat=2):
        first, second = next(sizes)
        cells.append(Cell(Config(a, 1 if a == "single" else first), Config(b, 1 if b == "single" else second), "bf16"))
    cells += [Cell(Config("zero2", a), Config("fsdp2", b), "bf16") for a, b in pairs]
    cells += [Cell(Config(e, w), Config(e, w), "bf16") for e in ("zero2", "zero3", "fsdp2") for w in (2, 4)]
    return list(dict.fromkeys([*cells, *(Cell(Config("zero1", w), Config("zero3", w), "bf16") for w in (2, 4))]))


def unused_cells() -> list[Cell]:
    pairs = itertools.product(ENGINES, ENGINES)
    return [Cell(Config(a, 1), Config(b, 1 if b == "single" else 2), unused=True) for a, b in pairs]


def quick_cells() -> list[Cell]:
    """At least 60 cells, every engine and every world size on both sides."""
    ring = configs()
    cells = [Cell(ring[i], ring[(i * 7 + shift) % len(ring)]) for shift in (0, 3) for i in range(len(ring))]
    return list(dict.fromkeys([*cells, *bf16_cells()[::9], *unused_cells()[::9]]))


def run_cells(cells: list[Cell], pools: Pools, folder: str) -> list[Row]:
    """Save each source once, then load cell by cell, grouped by target world size."""
    sources = {}
    for cell in cells:
        key = (cell.source, cell.dtype, cell.unused)
        if key not in sources:
            run = f"{folder}/{cell.source.engine}_{cell.source.world_size}_{cell.dtype}_{cell.unused}"
            pool = pools[cell.source.world_size]
            sources[key] = (run, pool.run(jobs.save_source, cell.source.engine, cell.dtype, cell.unused, run)[0])
    rows = []
    for number, cell in enumerate(sorted(cells, key=lambda c: c.target.world_size)):
        run, losses = sources[cell.source, cell.dtype, cell.unused]
        rows.append(_judge(cell, losses, _load(cell, run, pools, first_steps=number % 2)))
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(cells)} {cell.source} → {cell.target}    ", end="", file=sys.stderr)
    return rows


def _load(cell: Cell, run: str, pools: Pools, first_steps: int) -> Row:
    """``first_steps``: whether the target already has optimizer state of its own, which must give way."""
    try:
        return pools[cell.target.world_size].run(jobs.load_target, cell.target.engine, cell.dtype, cell.unused, run, first_steps)[0]
    except RankFailed as e:
        return {"failed": str(e)}


def _judge(cell: Cell, reference: list[float], shown: Row) -> Row:
    allowed = expected(cell)
    row: Row = {"source": str(cell.source), "target": str(cell.target), "dtype": cell.dtype, "unused": cell.unused, "allowed": allowed}
    if "failed" in shown or "refused" in shown:
        row["outcome"] = "failed" if "failed" in shown else "refused"
        row["reason"] = shown.get("failed") or shown["refused"]
        return row | {"as_expected": row["outcome"] == allowed}
    loss = max(abs(a - b) / abs(b) for a, b in zip(shown["losses"], reference, strict=True))
    bitwise = shown["difference"] == 0.0 and shown["whole"]
    fits = allowed != "refused" and bitwise and loss <= float(allowed)
    return row | {"outcome": "restored", "state_bitwise": bitwise, "loss_difference": loss, "as_expected": fits, "reason": ""}


def figures(rows: list[Row]) -> dict[str, float]:
    restored = [row for row in rows if row["outcome"] == "restored"]
    return {
        "cells": len(rows),
        "cells_state_bitwise": sum(row["state_bitwise"] for row in restored),
        "cells_refused": sum(row["outcome"] == "refused" for row in rows),
        "cells_failed": sum(row["outcome"] == "failed" for row in rows),
        "cells_unexpected": sum(not row["as_expected"] for row in rows),
        "max_relative_loss_difference_fp32": max((row["loss_difference"] for row in restored if row["dtype"] == "fp32"), default=0.0),
        "max_relative_loss_difference_bf16": max((row["loss_difference"] for row in restored if row["dtype"] == "bf16"), default=0.0),
    }


def measure(quick: bool) -> Result:
    began, pools, folder = time.perf_counter(), Pools(), tempfile.mkdtemp(prefix="lockstep_matrix_")
    try:
        rows = run_cells(quick_cells() if quick else all_cells(), pools, folder)
    finally:
        pools.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows, figures(rows) | {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main(measure, __doc__, shown=("source", "target", "dtype", "unused", "outcome", "loss_difference", "allowed", "as_expected"))
