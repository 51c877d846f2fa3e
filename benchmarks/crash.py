"""Processes killed at random instants: what is left must be a whole run of which nothing committed is lost.

Two ranks, each with its writer process, save again and again behind training. After a random time a rank, a writer, or all of them get
SIGKILL; ranks go on after the death of a writer, and are killed too after that of a rank, as a launcher would. Then ``latest`` must
be a step that was begun, not older than any that was told committed, and resume bit-exactly.

torn_visible: runs of which ``latest`` or a listed step did not load, or held other values. committed_lost: runs that came back to an
older step than one told committed.
"""

import contextlib
import multiprocessing as mp
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Result, Row, main

VICTIMS = ("rank 0", "rank 1", "writer 0", "writer 1", "all")
PRELOAD = ["torch", "torch.distributed.checkpoint", "engine.checkpointer"]
_STEPS = 150
_LONGEST_SECONDS = 0.15  # from the first save on; a save takes some 10 ms
_LAST_SECONDS = 5.0


@dataclass(frozen=True)
class Trial:
    """What was killed, what the ranks had told until then, and what was found: ``error`` is empty where it was sound."""

    victim: str
    committed: int
    resumed: int
    error: str
    lost: bool


def values(step: int) -> list[Any]:
    """A model of which every value follows from the step, with a part that never changes."""
    import torch
    from torch import nn

    module = nn.ParameterList(
        [nn.Parameter(torch.full((300, 7), float(step))), nn.Parameter(torch.full((5,), step + 0.5)), nn.Parameter(torch.ones(40))]
    )
    module[2].requires_grad_(False)
    module.register_buffer("seen", torch.tensor(step))
    return [module]


def _rank(run: str, rank: int, notes: str, first: int) -> None:
    """Saves step after step; notes what is begun, and what is committed."""
    import logging

    import torch
    import torch.distributed as dist

    from engine import Checkpointer, Progress
    from engine.errors import EngineError

    logging.getLogger("engine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{notes}.rendezvous", rank=rank, world_size=2)
    with open(f"{notes}.{rank}", "a", buffering=1) as file:
        (module,) = values(0)
        checkpointer = Checkpointer(run, module, keep_last=3, timeout_seconds=20, replicas="off")
        file.write(f"writer {checkpointer._saves._process.pid}\n")  # type: ignore[union-attr]
        failed, pid = 0, checkpointer._saves._process.pid  # type: ignore[union-attr]
        for step in range(first, first + _STEPS):
            with torch.no_grad():
                for live, value in zip(
                    [*module.parameters(), *module.buffers()], [*values(step)[0].parameters(), *values(step)[0].buffers()], strict=True
                ):
                    live.copy_(value)
            file.write(f"begun {step}\n")
            try:
                checkpointer.save(Progress(step=step))
                if step % 3 == 0:
                    checkpointer.wait()
                    file.write(f"committed {step}\n")
                    if failed:
                        break  # saves work again
            except EngineError as e:
                file.write(f"failed {type(e).__name__}\n")
                failed += 1
        with contextlib.suppress(EngineError):
            checkpointer.close()
        file.write(f"done {failed} {pid}\n")
    os._exit(0)


def _notes(path: str) -> list[list[str]]:
    try:
        with open(path) as file:
            return [line.split() for line in file.read().splitlines() if line]
    except FileNotFoundError:
        return []


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _until(what: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def trial(context: Any, folder: str, number: int, chance: random.Random) -> Trial:
    """One kill, in a run that goes on from trial to trial: what a kill leaves behind is where the next begins."""
    run, notes, victim = f"{folder}/run", f"{folder}/notes.{number}", VICTIMS[number % len(VICTIMS)]
    first = 1 + _STEPS * number
    ranks = [context.Process(target=_rank, args=(run, rank, notes, first), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        started = _until(lambda: all(["begun", str(first)] in _notes(f"{notes}.{rank}") for rank in range(2)), 60)
        writers = [int(line[1]) for rank in range(2) for line in _notes(f"{notes}.{rank}") if line[0] == "writer"]
        time.sleep(chance.uniform(0, _LONGEST_SECONDS))
        if victim == "all":
            for pid in chance.sample([*writers, *(rank.pid for rank in ranks)], 4) if len(writers) == 2 else []:
                _kill(pid)
        elif victim.startswith("writer"):
            _kill(writers[int(victim[-1])])
            stuck = not _until(lambda: not any(rank.is_alive() for rank in ranks), 60)
        else:
            _kill(ranks[int(victim[-1])].pid)
            time.sleep(chance.uniform(0, 0.03))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    orphans = not _until(lambda: all(_has_ended(pid) for pid in writers), _LAST_SECONDS)
    told = [line for rank in range(2) for line in _notes(f"{notes}.{rank}")]
    committed = max((int(line[1]) for line in told if line[0] == "committed"), default=0)
    error = "the ranks did not start" if not started else "a writer outlived its trainer" if orphans else ""
    if victim.startswith("writer") and not error:
        done = [line for line in told if line[0] == "done"]
        error = "ranks hang after a writer's death" if stuck or len(done) < 2 else ""
    found, lost = _check(run, committed, {int(line[1]) for line in told if line[0] == "begun"}, first)
    for path in (f"{notes}.rendezvous", f"{notes}.0", f"{notes}.1"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return Trial(victim, committed, found[0], error or found[1], lost)


def _check(run: str, committed: int, begun: set[int], first: int) -> tuple[tuple[int, str], bool]:
    """The step that a resume comes back to, what is wrong, and whether a step told committed is lost."""
    import torch

    from engine import Checkpointer, catalog
    from engine.errors import EngineError
    from engine.storage import LocalStorage

    (module,) = values(-1)
    try:
        step = Checkpointer(run, module, max_in_flight=0).resume(corrupt="error", missing="fresh").step
        for one in catalog.steps(LocalStorage(run)):
            if one.number != step:
                (other,) = values(-1)
                Checkpointer(run, other, read_only=True).resume(f"step:{one.number}")
                if int(other.seen) != one.number:
                    return (step, f"step {one.number} holds another's values"), False
    except EngineError as e:
        return (-1, f"{type(e).__name__}: {e}"), False
    if step == 0:
        return (0, ""), bool(committed)
    (expected,) = values(step)
    if not all(torch.equal(a, b) for a, b in zip([*module.parameters(), module.seen], [*expected.parameters(), expected.seen], strict=True)):
        return (step, f"latest is step {step} and holds another's values"), False
    if step >= first and step not in begun:
        return (step, f"latest is step {step}, which was never begun"), False
    return (step, ""), step < committed


def kills(count: int, seed: int = 0) -> list[Trial]:
    """``count`` trials, in a run that is begun anew every 50."""
    import logging

    import torch

    logging.getLogger("engine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    context, chance, found = mp.get_context("forkserver"), random.Random(seed), []
    context.set_forkserver_preload(PRELOAD)
    folder = tempfile.mkdtemp(prefix="lockstep_crash_")
    try:
        last = 0
        for number in range(count):
            if number % 50 == 0:
                shutil.rmtree(f"{folder}/run", ignore_errors=True)
                last = 0
            one = trial(context, folder, number, chance)
            if 0 <= one.resumed < last:  # committed in an earlier trial, and seen
                one = Trial(one.victim, last, one.resumed, one.error, True)
            last = max(last, one.resumed)
            found.append(one)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def measure(quick: bool) -> Result:
    found = kills(25 if quick else 1000)
    by_victim = Counter(one.victim for one in found)
    rows: list[Row] = [
        {
            "killed": victim,
            "kills": by_victim[victim],
            "torn_visible": sum(bool(one.error) for one in found if one.victim == victim),
            "committed_lost": sum(one.lost for one in found if one.victim == victim),
        }
        for victim in VICTIMS
    ]
    for one in found:
        if one.error:
            print(f"after the kill of {one.victim}: {one.error}")
    return rows, {
        "kills": len(found),
        "torn_visible": sum(bool(one.error) for one in found),
        "committed_lost": sum(one.lost for one in found),
    }


if __name__ == "__main__":
    main(measure, __doc__)
