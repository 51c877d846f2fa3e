"""A scheduler resumes where it was, as it was; what a run sets otherwise is reported, and wins where it is told to."""

import pytest
import torch
from torch.optim import lr_scheduler as lr

from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.record import decode_record, encode_record
from engine.state.scheduler import capture, check, explain, restore


class _Halving:
    """A rule with a state of its own, which torch keeps in the scheduler's."""

    def __init__(self, every):
        self.every = every

    def __call__(self, step):
        return 0.5 ** (step // self.every)


KINDS = {
    "step": lambda o: lr.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: lr.CosineAnnealingLR(o, T_max=10),
    "lambda": lambda o: lr.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one-cycle": lambda o: lr.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequential": lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=4), lr.CosineAnnealingLR(o, 8)], milestones=[4]),
    "multi-step": lambda o: lr.MultiStepLR(o, [2, 4, 7], gamma=0.5),
    "cyclic": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "callable object": lambda o: lr.LambdaLR(o, _Halving(4)),
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
    restore(resumed, capture(scheduler), resumed_optimizer.param_groups)
    assert explain(resumed, capture(scheduler), ()) == []
    assert _run(resumed_optimizer, resumed, 8) == _run(optimizer, scheduler, 8)


def test_a_plateau_is_remembered():
    _, scheduler = _make(lambda o: lr.ReduceLROnPlateau(o, patience=2, factor=0.5))
    for loss in (1.0, 2.0, 2.0):
        scheduler.step(loss)
    resumed_optimizer, resumed = _make(lambda o: lr.ReduceLROnPlateau(o, patience=2, factor=0.5))
    restore(resumed, capture(scheduler), resumed_optimizer.param_groups)
    assert (resumed.best, resumed.num_bad_epochs) == (1.0, 2)
    resumed.step(2.0)
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [0.05, 0.025]


def test_settings_are_the_checkpoints_and_a_difference_is_reported():
    optimizer, scheduler = _make("step")
    _run(optimizer, scheduler, 4)
    resumed_optimizer, resumed = _make(lambda o: lr.StepLR(o, 5, gamma=0.1))
    lines = check(resumed, capture(scheduler))
    assert [line.split(";")[0] for line in lines] == [
        "StepLR: gamma is 0.1 here and 0.5 in the checkpoint",
        "StepLR: step_size is 5 here and 3 in the checkpoint",
    ]
    restore(resumed, capture(scheduler), resumed_optimizer.param_groups)
    assert (resumed.step_size, resumed.gamma, resumed.last_epoch) == (3, 0.5, 4)


def test_settings_that_are_overridden_are_this_runs():
    optimizer, scheduler = _make("step")
    _run(optimizer, scheduler, 4)
    resumed_optimizer, resumed = _make(lambda o: lr.StepLR(o, 5, gamma=0.1))
    lines = check(resumed, capture(scheduler), ("step_size",))
    assert lines[1] == "StepLR: step_size is 5 here and 3 in the checkpoint; this run's is used"
    restore(resumed, capture(scheduler), resumed_optimizer.param_groups, ("step_size",))
    assert (resumed.step_size, resumed.gamma, resumed.last_epoch) == (5, 0.5, 4)
    assert explain(resumed, capture(scheduler), ("step_size",)) == []
    assert explain(resumed, capture(scheduler), ()) == [("step_size", 3, 5)]


def test_a_setting_inside_a_chain_is_compared_too():
    def chain(length):
        return lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=length), lr.ExponentialLR(o, 0.9)], milestones=[4])

    _, scheduler = _make(chain(4))
    _, resumed = _make(chain(6))
    assert ["total_iters" in line for line in check(resumed, capture(scheduler))] == [True]


def test_a_different_number_of_groups_is_no_obstacle():
    optimizer, scheduler = _make("cosine")
    _run(optimizer, scheduler, 3)
    single = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    resumed = KINDS["cosine"](single)
    restore(resumed, capture(scheduler), single.param_groups)
    assert resumed.last_epoch == 3
    assert len(resumed.base_lrs) == len(resumed._last_lr) == 1


def test_a_state_is_what_a_record_holds():
    for kind in KINDS:
        optimizer, scheduler = _make(kind)
        _run(optimizer, scheduler, 2)
        stored = capture(scheduler)
        assert decode_record(encode_record(stored)) == stored


class _Warmup(lr.LRScheduler):
    """Holds another scheduler, and lists it as an object or as its state."""

    def __init__(self, optimizer, after, listed):
        self.after, self.listed, self.window = after, listed, torch.zeros(3)
        super().__init__(optimizer)

    def get_lr(self):
        return [base * (self.last_epoch + 1) / 4 for base in self.base_lrs]

    def step(self, epoch=None):
        self.window = torch.cat([self.window[1:], torch.tensor([float(self.last_epoch)])]) if hasattr(self, "window") else self.window
        super().step() if self.last_epoch < 4 else self.after.step()

    def state_dict(self):
        state = {k: v for k, v in self.__dict__.items() if k not in ("optimizer", "after")}
        return state | ({"after": self.after} if self.listed == "object" else {"after_dict": self.after.state_dict()})

    def load_state_dict(self, state):
        state = dict(state)
        if "after_dict" in state:
            self.after.load_state_dict(state.pop("after_dict"))
        self.__dict__.update(state)


@pytest.mark.parametrize("listed", ["object", "state"])
@pytest.mark.parametrize("after", ["step", "cosine", "multi-step"])
def test_a_scheduler_inside_another_goes_on_too(listed, after):
    def warmup(optimizer):
        return _Warmup(optimizer, KINDS[after](optimizer), listed)

    optimizer, scheduler = _make(warmup)
    _run(optimizer, scheduler, 7)
    resumed_optimizer, resumed = _make(warmup)
    _copy_groups(optimizer, resumed_optimizer)
    restore(resumed, decode_record(encode_record(capture(scheduler))), resumed_optimizer.param_groups)
    assert torch.equal(resumed.window, scheduler.window)
    assert _run(resumed_optimizer, resumed, 8) == _run(optimizer, scheduler, 8)


def test_a_scheduler_without_an_optimizer_and_a_state_that_is_a_list():
    class Plain:
        def __init__(self):
            self.state = [1, 2.5]

        def step(self): ...

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    scheduler, resumed = Plain(), Plain()
    scheduler.state = [7, float("nan")]
    restore(resumed, capture(scheduler), [])
    assert resumed.state[0] == 7
    assert explain(resumed, capture(scheduler), ()) == []


def test_an_object_that_no_record_holds_is_refused_by_name():
    class Holder(lr.StepLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, 3)
            self.odd = object()

    _, scheduler = _make(Holder)
    with pytest.raises(UsageError, match=r"the scheduler Holder: state\.odd is a builtins\.object"):
        capture(scheduler)


def test_a_chain_of_a_different_length_is_refused():
    _, scheduler = _make("sequential")
    _, resumed = _make(lambda o: lr.SequentialLR(o, [lr.ExponentialLR(o, 0.9) for _ in range(3)], milestones=[2, 4]))
    with pytest.raises(IncompatibleCheckpoint, match="chains 3 schedulers here, 2 in the checkpoint"):
        check(resumed, capture(scheduler))
