"""Random training programs, saved and resumed: all that one holds comes back to the bit, or is refused by name before anything changes.

Each seed draws a module tree, optimizers, schedulers and other members, an engine and a number of ranks for the save and for the
resume, and in which order they train, save and resume (``benchmarks.fuzz.cases``). What is held is gathered by torch's and
DeepSpeed's own means (``benchmarks.fuzz.oracle``). ``--first N --seeds 1`` runs a case again.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.fuzz import cases
from benchmarks.fuzz.jobs import Shown, hanging, play
from benchmarks.harness import Result, Row, main
from benchmarks.pool import Pools, RankFailed

OUTCOMES = ("equal", "refused", "different", "crashed", "invalid")
"""``invalid``: training fails before the engine has changed anything. It must not happen: :data:`benchmarks.fuzz.cases.CANNOT`
says what an engine cannot train."""

TIMEOUT_SECONDS = 75.0
SEEDS, QUICK_SEEDS = 500, 40


def run_seed(seed: int, pools: Pools, check: bool = True, without: Sequence[str] = ()) -> Row:
    """Draw a case and run its two scripts. ``check``: False only trains. ``without``: see
    :func:`benchmarks.fuzz.cases.draw`."""
    case, began = cases.draw(seed, without), time.perf_counter()
    folder = tempfile.mkdtemp(prefix="lockstep_fuzz_")
    try:
        shown = Shown("equal")
        for part, side in enumerate(case.sides):
            shown = _run(pools, side.world_size, case, part, folder, check)
            if shown.outcome != "equal":
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row = {"seed": seed, "outcome": shown.outcome, "seconds": time.perf_counter() - began, "case": case.described()}
    row |= {"where": shown.where, "reason": " ".join(shown.reason.split())}
    return row | {"shown": row["case"] + (f" — {row['where']}: {row['reason']}"[:900] if shown.outcome != "equal" else "")}


def _run(pools: Pools, world_size: int, case: cases.Case, part: int, folder: str, check: bool) -> Shown:
    """The worst that a rank has seen. Ranks that have not all crashed alike may be out of step: others follow them."""
    try:
        found = pools[world_size].run(play, case, part, folder, check, timeout_seconds=TIMEOUT_SECONDS)
    except RankFailed as e:
        return Shown("crashed", "a rank's process", f"{str(e)[-300:]} {hanging(folder)}")
    worst = max(found, key=lambda shown: OUTCOMES.index(shown.outcome))
    if worst.outcome in ("crashed", "invalid") and any(shown != worst for shown in found):
        pools[world_size].close()
    return worst


def run_seeds(first: int, count: int, check: bool = True, without: Sequence[str] = ()) -> list[Row]:
    pools, rows = Pools(), []
    try:
        for seed in range(first, first + count):
            rows.append(run_seed(seed, pools, check, without))
            if sys.stderr.isatty():
                print(f"\r{len(rows)}/{count}  ", end="", file=sys.stderr)
    finally:
        pools.close()
    return rows


def figures(rows: list[Row]) -> dict[str, float]:
    found = Counter(row["outcome"] for row in rows)
    return {"seeds": len(rows), **{outcome: found[outcome] for outcome in OUTCOMES}}


def measure(quick: bool, seeds: int | None = None, first: int = 0, without: str = "") -> Result:
    began = time.perf_counter()
    rows = run_seeds(first, seeds or (QUICK_SEEDS if quick else SEEDS), without=[name.strip() for name in without.split(",") if name])
    return rows, figures(rows) | {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main(
        measure,
        __doc__,
        shown=("seed", "outcome", "shown"),
        options={
            "seeds": (int, "how many seeds"),
            "first": (int, "the first of them"),
            "without": (str, "features to draw no case with, by their names in benchmarks.fuzz.cases: 'extra,late,two optimizers'"),
        },
    )
