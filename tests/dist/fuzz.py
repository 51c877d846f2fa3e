"""Jobs for test_fuzz: what the oracle sees of a single change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.fuzz import cases
from benchmarks.fuzz.oracle import differences, gather
from benchmarks.fuzz.program import Program


def seen(case: cases.Case) -> dict[str, list[str]]:
    """What the oracle says of each change to a trained program, one after the other; and of none."""
    program = Program(case, case.sides[0], seed=3, factor=1.0)
    try:
        program.step(0)
        program.step(1)
        found = {}
        for name, change in {"nothing": lambda _: None, **CHANGES}.items():
            before = gather(program).everything()
            change(program)
            found[name] = differences(before, gather(program).everything())
        return found
    finally:
        program.close()


def case_on(engine: str, world_size: int) -> cases.Case:
    side = cases.Side(engine, world_size)
    leaves = {
        "norm": cases.Node("norm", {"which": "batch"}),
        "lin": cases.Node("affine", {"out": 3, "bias": True, "norm": ""}),
        "late": cases.Node("late", {"grows": True}),
        "extra": cases.Node("extra", {"kind": "dict"}),
    }
    trained = cases.Trained("AdamW", 1, False, "SequentialLR")
    return dataclasses.replace(
        cases.draw(0), tree=cases.Node("tree", {"how": "attributes"}, leaves), trained=(trained,), sides=(side, side), dtype="fp32",
        tied=0, frozen=0, left_out=False, wrapped=False, members={"notes": "float"}, named=False, scripts=((), ()),
    )  # fmt: skip


def _local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def _flip_a_bit(tensor: Any) -> None:
    """Of the last byte but one: in fp32 a change that no tolerance would see."""
    local = _local(tensor)
    if local.numel():
        local.view(-1)[:1].view(torch.uint8)[0] ^= 1


def _state_of(program: Program) -> dict[str, Any]:
    return next(iter(program.optimizers[0].state.values()))


def _replace_step(program: Program) -> None:
    for state in program.optimizers[0].state.values():
        state["step"] = int(state["step"])


CHANGES: dict[str, Callable[[Program], Any]] = {
    "moment": lambda program: _flip_a_bit(_state_of(program)["exp_avg"]),
    "step": _replace_step,
    "group": lambda program: program.optimizers[0].param_groups[0].update(weight_decay=0),
    "scheduler": lambda program: setattr(program.schedulers[0]._schedulers[0], "_step_count", 9),
    "buffer": lambda program: program.module.net.norm.norm.num_batches_tracked.add_(1),  # type: ignore[union-attr, operator]
    "late buffer": lambda program: setattr(program.module.net.late, "cache", None),
    "extra state": lambda program: program.module.net.extra.set_extra_state({}),  # type: ignore[operator]
    "member": lambda program: program.objects["notes"].step(),
    "random state": lambda program: torch.rand(()),
}
