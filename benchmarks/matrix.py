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
from typing import Any

from benchmarks import jobs
from benchmarks.harness import Result, Row, main
from benchmarks.pool import Pools, RankFailed
from benchmarks.zoo import ENGINES, VARIANTS, Variant

WORLD_SIZES = (1, 2, 3, 4)
DTYPES = ("fp32", "bf16", "fp16")

# Relative, over the two losses after the load. Gloo sums in another order above two ranks, and another world size cuts the batch
# differently; in bf16 and fp16 the engines also round at different places.
FP32_TOLERANCE = 1e-6
LOW_TOLERANCE = 2e-3
OTHER_STEPS_TOLERANCE = 3e-2  # where the state is the same, but the target's next steps are others


@dataclass(frozen=True)
class Config:
    engine: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.engine}×{self.world_size}"

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.engine]

    @property
    def is_flat(self) -> bool:
        """The optimizer sees flat buffers of many parameters, not parameters."""
        return self.variant.stage >= 1

    @property
    def is_cut(self) -> bool:
        """The optimizer sees DTensors, of which a rank holds a piece."""
        return self.variant.base == "fsdp2" or "tp" in self.variant.mesh


@dataclass(frozen=True)
class Cell:
    """``dtype`` and what follows: what is trained, the same on both sides. Arguments of :func:`benchmarks.zoo.build`."""

    source: Config
    target: Config
    dtype: str = "fp32"
    unused: bool = False
    optimizer: str = "adamw"
    ema: bool = False

    @property
    def kind(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "unused": self.unused, "optimizer": self.optimizer, "ema": self.ema}


def expected(cell: Cell) -> float | str:
    """``"refused"``, or the largest relative difference allowed of the next two losses: 0.0 is bitwise."""
    source, target = cell.source, cell.target
    if cell.unused and source.variant.stage < 0 and target.is_flat:
        return "refused"  # the unused parameter has no step count there, the others of its flat buffer have one
    if cell.optimizer == "blockwise" and any(config.is_flat or config.is_cut for config in (source, target)):
        return "refused"  # its blocks begin where a rank's piece begins: their scales are no tensor that could be cut anew
    if cell.optimizer in ("factored", "adafactor") and source.is_flat != target.is_flat:
        return "refused"  # a flat buffer is a vector, whose moment is not factored
    if source == target:
        return 0.0
    if cell.optimizer == "schedule_free" and 3 in (source.variant.stage, target.variant.stage):
        return OTHER_STEPS_TOLERANCE  # ZeRO-3 takes a step of the optimizer for each sub-group: what a group counts runs faster
    if cell.dtype == "fp16" and source.variant.stage < 0 <= target.variant.stage:
        return OTHER_STEPS_TOLERANCE  # no loss scale was saved: the target goes on with its own, and may skip a step
    same_sums = source.world_size == target.world_size <= 2 and _same_sums(cell)
    if cell.dtype != "fp32":
        return 0.0 if same_sums and source.is_flat and target.is_flat else LOW_TOLERANCE
    return 0.0 if same_sums else FP32_TOLERANCE


def _same_sums(cell: Cell) -> bool:
    """Whether both sides add the same numbers in the same order, where as many ranks add them. Sums over a dimension that is cut are
    added piece by piece; DeepSpeed's CPUAdam fuses multiplications and additions."""
    for config in (cell.source, cell.target):
        if "tp" in config.variant.mesh or config.variant.optimizer or (cell.optimizer == "factored" and config.is_cut):
            return False
    return True


def configs(engines: Iterable[str] = ENGINES) -> list[Config]:
    return [Config(e, w) for e in engines for w in WORLD_SIZES if e != "single" or w == 1]


def all_cells() -> list[Cell]:
    """fp32: every pair. bf16: each ordered pair of engines, the pairs of world sizes in turn, and each pair of world sizes at
    least once. An unused parameter: every ordered pair of engines at 1→2 and 2→1 ranks."""
    cells = [Cell(a, b) for a, b in itertools.product(configs(), configs())]
    return list(dict.fromkeys([*cells, *bf16_cells(), *unused_cells(), *further_cells()]))


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


def further_cells() -> list[Cell]:
    """Every further way to use an engine, and every further kind of state: to itself, to others, and back."""
    cells: list[Cell] = []
    for stage in ("zero1", "zero2", "zero3"):
        cells += around(f"{stage}_offload×2", to=f"{stage}×2 fsdp2×3 single×1", back=f"{stage}×4")
        cells += around(f"{stage}_offload×2", to=f"{stage}×2", dtype="bf16")
        cells += around(f"{stage}×2", to="zero1×2 zero2×2 zero3×2 zero2×4", back="zero3×4", dtype="fp16")
    cells += around("zero2_offload×2", to="fsdp2×2 zero1×1", back="single×1", dtype="fp16")
    cells += around("hsdp×4", to="fsdp2×2 zero2×2 single×1", back="fsdp2×3 zero3×4 ddp×2 single×1")
    cells += around("hsdp×4", back="zero1×4", dtype="bf16")
    cells += around("tp×2", to="single×1 zero3×2 fsdp2×4", back="single×1 zero1×3")
    cells += around("fsdp2_tp×4", to="single×1 fsdp2×2 zero2×2 tp×4", back="single×1 zero3×4 tp×2 hsdp×4")
    cells += around("zero3_hpz×4", to="zero3×2 fsdp2×2", back="zero3×4 ddp×3")
    cells += around("zero3_hpz×4", to="zero3×4", dtype="bf16")
    for optimizer in ("momentum", "schedule_free"):
        ring = ("single×1", "ddp×2", "fsdp2×2", "zero1×2", "zero3×2", "single×1")
        for this, following in itertools.pairwise(ring):
            cells += around(this, to=following, optimizer=optimizer)
        cells += around("fsdp2×3", to="zero2×4", back="zero1×2", optimizer=optimizer)
    cells += around("fsdp2×2", to="ddp×2 hsdp×4", back="single×1 fsdp2×4 zero0×2", optimizer="factored")
    cells += around("zero1×2", to="zero3×2 single×1 fsdp2×2", back="zero3×3 ddp×2 hsdp×4", optimizer="factored")
    cells += around("ddp×2", to="single×1 zero1×2", back="zero0×1 zero1×2", optimizer="adafactor")
    cells += around("ddp×2", to="single×1 zero0×4 zero3×2", back="single×1 zero2×2 fsdp2×3", optimizer="blockwise")
    for engine, others in (("ddp", "zero2×3 single×1"), ("fsdp2", "zero1×2 ddp×3"), ("zero3", "fsdp2×4 zero1×2"), ("zero1", "zero3×2")):
        cells += around(f"{engine}×2", to=others, ema=True)
    for engine in ("ddp", "fsdp2"):
        cells += around(f"{engine}_compiled×2", to="single×1", back=f"{engine}×2 zero2×2")
        cells += around(f"{engine}_recomputed×2", to=f"{engine}×2 zero3×2", back=f"{engine}_compiled×2")
    return list(dict.fromkeys(cells))


def compiled_cells() -> list[Cell]:
    """With DeepSpeed's own optimizer for the CPU, whose op takes most of a minute to compile once."""
    return around("zero2_cpu_adam×2", to="zero2×2 single×1", back="fsdp2×3") + around("zero3_cpu_adam×2", to="zero2_cpu_adam×2", back="ddp×2")


def around(variant: str, to: str = "", back: str = "", **kind: Any) -> list[Cell]:
    """A configuration to itself, to others and back from others. Configurations are written as they are shown: ``zero2×4``."""
    this = _config(variant)
    pairs = [(this, this), *((this, _config(other)) for other in to.split()), *((_config(other), this) for other in back.split())]
    return [Cell(source, target, **kind) for source, target in pairs]


def _config(shown: str) -> Config:
    engine, world_size = shown.split("×")
    return Config(engine, int(world_size))


def quick_cells() -> list[Cell]:
    """At least 60 cells, every engine and every world size on both sides; and every further variant and kind."""
    ring = configs()
    cells = [Cell(ring[i], ring[(i * 7 + shift) % len(ring)]) for shift in (0, 3) for i in range(len(ring))]
    return list(dict.fromkeys([*cells, *bf16_cells()[::9], *unused_cells()[::9], *covering(further_cells())]))


def covering(cells: list[Cell]) -> list[Cell]:
    """Of the cells between two configurations those that first show a variant, fp16, or a kind of state as an optimizer sees it: whole,
    flat or cut. The rest of the quick cells show the engines, fp32 and bf16."""
    shown: set[Any] = {*ENGINES, "fp32", "bf16", "fp32 in pieces", "bf16 in pieces"}
    found = []
    for cell in cells:
        kind: Any = cell.dtype + (" in pieces" if cell.target.variant.stage == 3 else "")
        if cell.optimizer != "adamw" or cell.ema:
            kind = (cell.optimizer, cell.ema, cell.target.is_flat, cell.target.is_cut)
        new = {cell.source.engine, cell.target.engine, kind} - shown
        if cell.source != cell.target and new:
            shown |= new
            found.append(cell)
    return found


def run_cells(cells: list[Cell], pools: Pools, folder: str) -> list[Row]:
    """Save each source once, then load cell by cell, grouped by target world size."""
    saved: dict[tuple[Any, ...], tuple[str, Row]] = {}
    for cell in cells:
        key = (cell.source, *cell.kind.values())
        if key not in saved:
            run = f"{folder}/{len(saved)}"
            saved[key] = (run, _run(pools, cell.source, jobs.save_source, cell.kind, run))
    rows = []
    for number, cell in enumerate(sorted(cells, key=lambda c: c.target.world_size)):
        run, source = saved[(cell.source, *cell.kind.values())]
        rows.append(_judge(cell, source, _load(cell, run, pools, number % 2) if "losses" in source else source))
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(cells)} {cell.source} → {cell.target}    ", end="", file=sys.stderr)
    return rows


def _load(cell: Cell, run: str, pools: Pools, first_steps: int) -> Row:
    """``first_steps``: whether the target already has optimizer state of its own, which must give way. A refusal must not depend on it."""
    shown: Row = {}
    for steps in (0, 1) if expected(cell) == "refused" else (first_steps,):
        shown = _run(pools, cell.target, jobs.load_target, cell.kind, run, steps)
        if "refused" not in shown:
            break
    return shown


def _run(pools: Pools, config: Config, job: Any, *args: Any) -> Row:
    try:
        return pools[config.world_size].run(job, config.engine, *args)[0]
    except RankFailed as e:
        return {"failed": str(e)}


def _judge(cell: Cell, source: Row, shown: Row) -> Row:
    allowed = expected(cell)
    row: Row = {"source": str(cell.source), "target": str(cell.target), **cell.kind, "allowed": allowed}
    if "failed" in shown or "refused" in shown:
        row["outcome"] = "failed" if "failed" in shown else "refused"
        row["reason"] = shown.get("failed") or shown["refused"]
        return row | {"as_expected": row["outcome"] == allowed}
    loss = max(abs(a - b) / abs(b) for a, b in zip(shown["losses"], source["losses"], strict=True))
    bitwise = shown["difference"] == 0.0 and shown["whole"] and not shown["changed"]
    fits = allowed != "refused" and bitwise and loss <= float(allowed)
    reason = "" if fits else f"difference {shown['difference']}, parameters alike: {shown['whole']}, changed: {shown['changed']}"
    return row | {"outcome": "restored", "state_bitwise": bitwise, "loss_difference": loss, "as_expected": fits, "reason": reason}


def figures(rows: list[Row]) -> dict[str, float]:
    restored = [row for row in rows if row["outcome"] == "restored"]
    losses = {
        dtype: [row["loss_difference"] for row in restored if row["dtype"] == dtype and row["allowed"] != OTHER_STEPS_TOLERANCE] for dtype in DTYPES
    }
    return {
        "cells": len(rows),
        "cells_state_bitwise": sum(row["state_bitwise"] for row in restored),
        "cells_refused": sum(row["outcome"] == "refused" for row in rows),
        "cells_failed": sum(row["outcome"] == "failed" for row in rows),
        "cells_unexpected": sum(not row["as_expected"] for row in rows),
        **{f"max_relative_loss_difference_{dtype}": max(found, default=0.0) for dtype, found in losses.items()},
    }


def measure(quick: bool) -> Result:
    began, pools, folder = time.perf_counter(), Pools(), tempfile.mkdtemp(prefix="lockstep_matrix_")
    try:
        if not quick:
            pools[1].run(jobs.build_cpu_adam, timeout_seconds=600.0)
        rows = run_cells(quick_cells() if quick else all_cells() + compiled_cells(), pools, folder)
    finally:
        pools.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows, figures(rows) | {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main(measure, __doc__, shown=("source", "target", "dtype", "unused", "optimizer", "ema", "outcome", "loss_difference", "allowed", "as_expected"))
