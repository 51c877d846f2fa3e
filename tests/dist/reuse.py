"""Jobs for test_reuse: models of which a part is frozen, saved step after step."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import engine as lockstep
from engine import Progress
from tests.dist import rows
from tests.dist.jobs import moments, told, trained
from tests.now import Checkpointer


def worth_it():
    """The zoo's frozen layer has 1,024 bytes."""
    return mock.patch("engine.plan.assign.FROZEN_BYTES", 512)


def save_steps(engine: str, run: str, first: int, stop: int, *, resume: str = "", behind: int = 0, more: int = 2, **options: Any) -> dict[str, Any]:
    """Steps [first, stop), each trained and saved: of each the whole parameters, and this rank's bytes in all and linked; then the next
    losses. ``resume`` what, into a model of another seed; its parameters then."""
    events: list[Any] = []
    with worth_it(), trained(engine, 1 if resume else 0, **options) as made:
        make = lockstep.Checkpointer if behind else Checkpointer
        checkpointer = make(run, made.member, events=[events.append], **({"max_in_flight": behind} if behind else {}), **made.members)
        found: dict[str, Any] = {"states": {}, "resumed": None}
        if resume:
            found["step"] = checkpointer.resume(resume).step
            found["difference"] = checkpointer.max_difference()
            found["resumed"] = made.whole_parameters()
        for number in range(first, stop):
            made.step(number)
            checkpointer.save(Progress(step=number, samples=number * 12))
            found["states"][number] = made.whole_parameters()
        checkpointer.close()
        found["bytes"] = [(event.size_bytes, event.reused_bytes) for event in events]
        found["losses"] = [made.global_loss(stop + i) for i in range(more)]
        return found


def save_for_stock(engine: str, run: str) -> None:
    """As the job of this name in jobs, but that the step's frozen weights are linked from the step before."""
    with worth_it(), trained(engine, steps=1) as made:
        checkpointer = Checkpointer(run, made.member)
        checkpointer.save(Progress(step=1))
        made.step(1)
        checkpointer.save(Progress(step=2))
        expected = {f"model.{k}": v for k, v in made.whole_parameters().items()}
        expected |= {f"optim.state.{k}.exp_avg": v for k, v in moments(made).items()}
        losses = [made.global_loss(2 + i) for i in range(2)]
    if dist.get_rank() == 0:
        torch.save({"tensors": expected, "losses": losses}, f"{run}/expected.pt")


def save_rows(engine: str, run: str, dtype: str) -> list[float]:
    with mock.patch("engine.plan.assign.FROZEN_BYTES", 64), rows._built(engine, True, 0, dtype, rows.ROWS) as (member, step):
        checkpointer = Checkpointer(run, member)
        for number in range(4):
            step(number)
            checkpointer.save(Progress(step=1 + number))
        return [step(4 + number) for number in range(2)]


def load_rows(engine: str, run: str, dtype: str) -> dict[str, Any]:
    with rows._built(engine, True, 1, dtype, rows.ROWS) as (member, step):
        checkpointer = Checkpointer(run, member)
        checkpointer.resume("latest")
        return {"difference": checkpointer.max_difference(), "losses": [step(4 + number) for number in range(2)]}


def save_where_one_rank_cannot_link(run: str, failing: int) -> list[tuple[int, int]]:
    """Links are refused to one rank only, at the third save."""
    events: list[Any] = []

    def refuse(source: str, *_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link", source)

    with worth_it(), trained("fsdp2", steps=1) as made:
        checkpointer = Checkpointer(run, made.member, events=[events.append])
        for number in range(1, 5):
            without = number == 3 and dist.get_rank() == failing
            with mock.patch.object(os, "link", refuse) if without else contextlib.nullcontext():
                checkpointer.save(Progress(step=number))
    return [(event.size_bytes, event.reused_bytes) for event in events]


def save_where_one_rank_fails_to_capture(run: str, failing: int) -> list[str]:
    """At step 3, behind training, which goes on; an average is among what looks frozen. The error of each save on this rank."""
    errors = []
    with worth_it(), trained("fsdp2", ema=True) as made:
        checkpointer = lockstep.Checkpointer(run, made.member, **made.members, on_failure="warn")
        for number in range(1, 9):
            made.step(number)
            metrics: Any = {"loss": None if number == 3 and dist.get_rank() == failing else 1.0}
            errors.append(told(lambda: checkpointer.save(Progress(step=number), metrics)))  # noqa: B023
        checkpointer.close()
    return errors
