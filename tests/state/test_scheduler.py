"""A scheduler resumes where it was, and keeps how it is configured now."""

import pytest
import torch
from torch.optim import lr_scheduler as lr

from engine.state.scheduler import position, restore_position

KINDS = {
    "step": lambda o: lr.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: lr.CosineAnnealingLR(o, T_max=10),
    "lambda": lambda o: lr.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: lr.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequential": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=4), lr.CosineAnnealingLR(o, 8)], milestones=[4]),
    "chained": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.5, total_iters=6), lr.ExponentialLR(o, 0.9)]),
}


def _make(kind, rate=0.1):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": rate / 2}], lr=rate)
    return optimizer, KINDS[kind](optimizer) if isinstance(kind, str) else kind(optimizer)


def _run(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def _copy_groups(source, target):
    for mine, theirs in zip(target.param_groups, source.param_groups, strict=True):
        mine.update({k: v for k, v in theirs.items() if k != "params"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 3, 5])
def test_the_rates_after_a_resume_are_those_of_an_uninterrupted_run(kind, done):
    optimizer, scheduler = _make(kind)
    _run(optimizer, scheduler, done)
    resumed_optimizer, resumed = _make(kind)
    _copy_groups(optimizer, resumed_optimizer)  # hyper-parameters are restored before the position
    restore_position(resumed, position(scheduler))
    assert _run(resumed_optimizer, resumed, 8) == _run(optimizer, scheduler, 8)


def test_a_plateau_is_remembered():
    _, scheduler = _make(lambda o: lr.ReduceLROnPlateau(o, patience=2, factor=0.5))
    for loss in (1.0, 2.0, 2.0):
        scheduler.step(loss)
    resumed_optimizer, resumed = _make(lambda o: lr.ReduceLROnPlateau(o, patience=2, factor=0.5))
    restore_position(resumed, position(scheduler))
    assert (resumed.best, resumed.num_bad_epochs) == (1.0, 2)
    resumed.step(2.0)
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [0.05, 0.025]


def test_configuration_follows_the_resuming_run():
    optimizer, scheduler = _make("step")
    _run(optimizer, scheduler, 4)
    stored = position(scheduler)
    assert not {"step_size", "gamma"} & set(stored)
    _, resumed = _make(lambda o: lr.StepLR(o, 5, gamma=0.1))
    restore_position(resumed, stored)
    assert (resumed.step_size, resumed.gamma, resumed.last_epoch) == (5, 0.1, 4)


def test_another_number_of_groups_is_no_obstacle():
    optimizer, scheduler = _make("cosine")
    _run(optimizer, scheduler, 3)
    single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    resumed = KINDS["cosine"](single)
    restore_position(resumed, position(scheduler))
    assert resumed.last_epoch == 3
    assert len(resumed.base_lrs) == len(resumed._last_lr) == 1


def test_a_position_is_plain_values():
    from engine.format.record import decode_record, encode_record

    for kind in KINDS:
        optimizer, scheduler = _make(kind)
        _run(optimizer, scheduler, 2)
        stored = position(scheduler)
        assert decode_record(encode_record(stored)) == stored
