"""What the ranks do in the tests of saves behind training."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from engine import Checkpointer, Progress
from engine.transfer.staging import Copies
from tests.dist.jobs import told, trained


class _Late:
    """A copy that is not made before it must be, as one that overlaps on CUDA may be."""

    def __init__(self, copies: Copies, start: Any) -> None:
        self._copies, self._start, self._made = copies, start, threading.Event()

    def before_change(self) -> None:
        if not self._made.is_set():
            self._start(self._copies)
            self._made.set()

    def wait(self) -> None:
        assert self._made.wait(30), "the optimizer never said that it would change anything"


def save_late(engine: str, run: str, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses after a save whose copies overlap with the next step; and after a resume from it."""
    start = Copies.start
    with trained(engine, steps=2, **options) as made:
        with mock.patch.object(Copies, "start", lambda copies: _Late(copies, start)):
            checkpointer = Checkpointer(run, made.member, timeout_seconds=30)
            checkpointer.save(Progress(step=2))
            losses = [made.step(2), made.step(3)]
            checkpointer.close()
        checkpointer = Checkpointer(run, made.member, max_in_flight=0)
        checkpointer.resume("latest")
        difference = checkpointer.max_difference()
        assert difference == 0.0
        return losses, [made.step(2), made.step(3)]


def count_collectives(run: str) -> list[str]:
    """What any process group is asked for in a save after the first, and while it is waited for."""
    calls: list[str] = []
    names = [n for n in dir(dist.ProcessGroup) if n.startswith(("all", "broadcast", "reduce", "gather", "scatter", "send", "recv", "barrier"))]
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member)
        checkpointer.save(Progress(step=1))
        checkpointer.wait()
        patches = [mock.patch.object(dist.ProcessGroup, name, lambda *a, name=name, **k: calls.append(name)) for name in names]
        functions = [mock.patch.object(dist, n, lambda *a, n=n, **k: calls.append(n)) for n in ("all_reduce", "all_gather_object", "barrier")]
        for patch in patches + functions:
            patch.start()
        try:
            for number in (2, 3):
                checkpointer.save(Progress(step=number))
            checkpointer.wait()
        finally:
            for patch in patches + functions:
                patch.stop()
        checkpointer.close()
        return calls


def save_under_load(run: str, saves: int) -> float:
    """Back-to-back saves, with the trainer's own barriers and all-reduces between and meanwhile."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(32, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(run, (model, optimizer), keep_last=2, timeout_seconds=30)
    for number in range(1, saves + 1):
        model(torch.ones(2, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(Progress(step=number))
        dist.barrier()
        dist.all_reduce(torch.ones(4))
    checkpointer.close()
    checkpointer = Checkpointer(run, (model, optimizer), max_in_flight=0)
    assert checkpointer.resume().step == saves
    return checkpointer.max_difference()


def lose_a_writer(run: str) -> tuple[str, list[str]]:
    """Rank 1's writer is killed while it writes step 2."""
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=20)
        checkpointer.save(Progress(step=1))
        checkpointer.wait()
        if dist.get_rank() == 1:
            os.kill(checkpointer._saves._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        checkpointer.save(Progress(step=2))
        if dist.get_rank() == 1:
            time.sleep(0.5)
            os.kill(checkpointer._saves._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        error = told(checkpointer.wait)
        checkpointer.save(Progress(step=3))
        checkpointer.close()
        return error, sorted(name for name in os.listdir(run) if "step_" in name)


def hear_at_other_times(run: str) -> tuple[list[str], list[str]]:
    """The save of step 2 fails on rank 1. Rank 0 hears of it at the save of step 3, rank 1 when it waits after that."""
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=20)
        checkpointer.save(Progress(step=1))
        checkpointer.wait()
        if dist.get_rank() == 1:
            checkpointer._saves._process.kill()  # type: ignore[union-attr]
            with mock.patch.object(checkpointer._saves, "_running", lambda: checkpointer._saves._process):
                checkpointer.save(Progress(step=2))
                checkpointer._saves.wait_idle()
        else:
            checkpointer.save(Progress(step=2))
            checkpointer._saves.wait_idle()
        late = mock.patch.object(checkpointer._saves, "check") if dist.get_rank() == 1 else contextlib.nullcontext()
        with late:
            errors = [told(lambda: checkpointer.save(Progress(step=3)))]
        errors.append(told(checkpointer.wait))
        checkpointer.save(Progress(step=4))
        checkpointer.close()
        return errors, sorted(name for name in os.listdir(run) if "step_" in name)


def one_rank_cannot_save(run: str, why: str) -> tuple[str, float, list[str]]:
    """Rank 1 fails before anything of step 2 is written, in the trainer."""
    with trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, timeout_seconds=30)
        checkpointer.save(Progress(step=1))
        began = time.perf_counter()
        step: Any = 2
        fault: Any = contextlib.nullcontext()
        if dist.get_rank() == 1:
            step = "two" if why == "captured" else 2
            if why == "staged":
                fault = mock.patch.object(Copies, "start", side_effect=ValueError("progress takes whole numbers and memory"))
        with fault:
            error = told(lambda: checkpointer.save(Progress(step=step)))
        error = error or told(checkpointer.wait)
        seconds = time.perf_counter() - began
        checkpointer.save(Progress(step=3))
        checkpointer.close()
        return error, seconds, sorted(name for name in os.listdir(run) if "step_" in name)
