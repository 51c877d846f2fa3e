"""Every piece of state that an object has is back after a resume, as the type it was, or was refused by name."""

import collections
import enum
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as lr

from engine import Progress
from engine.errors import EngineError, IncompatibleCheckpoint, UsageError
from tests.now import Checkpointer


def alike(a, b) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b or (a != a and b != b)


class Net(nn.Module):
    """With a place for whatever a module may list besides parameters and buffers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mean", None)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def made(seed=0, optimizer=torch.optim.AdamW, net=Net, **options):
    module = net(seed)
    return module, optimizer(module.parameters(), lr=0.01, **options)


def train(module, *optimizers, steps=1, scheduler=None):
    losses = []
    for number in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        loss = module(x).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def save(run, *members, **objects):
    Checkpointer(run, members if len(members) > 1 else members[0], **objects).save(Progress(step=1))


def resume(run, *members, how=None, **objects):
    checkpointer = Checkpointer(run, members if len(members) > 1 else members[0], **objects)
    checkpointer.resume(**(how or {}))
    return checkpointer


# ------------------------------------------------------------------ modules


class Scaled(Net):
    """As FP8 layers have it: a running maximum that is not a buffer."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.kept = {"amax": 1.0, "history": torch.zeros(3), "steps": [0]}

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


def test_extra_state_with_numbers_lists_and_tensors_comes_back(tmp_path):
    module, optimizer = made(net=Scaled)
    train(module, optimizer)
    module.kept = {"amax": 3.5, "history": torch.tensor([1.0, float("nan"), 3.0]), "steps": [1, (2, None)]}
    save(tmp_path, module, optimizer)
    fresh, fresh_optimizer = made(1, net=Scaled)
    resume(tmp_path, fresh, fresh_optimizer)
    assert alike(fresh.kept, module.kept)


def test_large_tensors_of_extra_state_are_tensors_of_the_checkpoint(tmp_path):
    module = Scaled()
    module.kept["history"] = torch.randn(200, 200)
    save(tmp_path, module)
    fresh = Scaled(1)
    resume(tmp_path, fresh)
    assert torch.equal(fresh.kept["history"], module.kept["history"])


def test_extra_state_that_only_one_side_has_is_refused_by_name_unless_allowed(tmp_path):
    save(tmp_path, Scaled())
    with pytest.raises(IncompatibleCheckpoint, match=r"\['extra\._extra_state'\] only in the checkpoint \(allow_unexpected\)"):
        resume(tmp_path, Net())
    resume(tmp_path, Net(), how={"allow_unexpected": ["extra.*"]})


def test_extra_state_that_no_record_holds_is_refused_at_attach(tmp_path):
    module = Scaled()
    module.kept["odd"] = object()
    with pytest.raises(UsageError, match=r"the extra state of Scaled: _extra_state\.odd is a builtins\.object"):
        Checkpointer(tmp_path, module)


class Hooked(Net):
    """A hook adds an entry; whether it is taken back is ``knows``."""

    def __init__(self, seed=0, knows=True):
        super().__init__(seed)
        self.seen, self.knows = 0, knows
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}seen": torch.tensor(module.seen)}))

    def _load_from_state_dict(self, state, prefix, *rest):
        if self.knows and f"{prefix}seen" in state:
            self.seen = int(state.pop(f"{prefix}seen"))
        super()._load_from_state_dict(state, prefix, *rest)


def test_what_a_hook_lists_comes_back_and_is_refused_where_the_module_would_not_take_it(tmp_path):
    module = Hooked()
    module.seen = 7
    save(tmp_path / "run", module)
    fresh = Hooked(1)
    resume(tmp_path / "run", fresh)
    assert fresh.seen == 7
    with pytest.raises(UsageError, match=r"seen is in the module's state_dict\(\), .* would be lost on a resume"):
        Checkpointer(tmp_path / "other", Hooked(knows=False))


def test_parameters_under_names_that_a_hook_has_changed_are_not_extra_state(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = Net()
    module.first = checkpoint_wrapper(module.first)
    module.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}renamed": state.pop(f"{prefix}last.weight")}))
    save(tmp_path, module)
    fresh = Net(1)
    resume(tmp_path, fresh)
    assert torch.equal(fresh.first.weight, module.first.weight)


def test_a_buffer_that_is_none_at_attach_and_filled_later_comes_back(tmp_path):
    module = Net()
    checkpointer = Checkpointer(tmp_path, module)
    module.mean = torch.tensor([1.0, 2.0])
    checkpointer.save(Progress(step=1))
    fresh = Net(1)
    resume(tmp_path, fresh)
    assert torch.equal(fresh.mean, module.mean)


def test_a_buffer_that_was_none_is_none_again(tmp_path):
    save(tmp_path, Net())
    fresh = Net(1)
    fresh.mean = torch.ones(2)
    resume(tmp_path, fresh)
    assert fresh.mean is None


def test_a_buffer_that_is_added_later_is_saved_and_refused_by_name_where_there_is_none(tmp_path):
    module = Net()
    checkpointer = Checkpointer(tmp_path, module)
    module.last.register_buffer("late", torch.ones(2))
    checkpointer.save(Progress(step=1))
    with pytest.raises(IncompatibleCheckpoint, match=r"buffers\.last\.late"):
        resume(tmp_path, Net(1))
    fresh = Net(1)
    fresh.last.register_buffer("late", torch.zeros(2))
    resume(tmp_path, fresh)
    assert torch.equal(fresh.last.late, torch.ones(2))


def test_a_buffer_of_a_different_shape_is_refused_unless_it_may_be_resized(tmp_path):
    module, fresh = Net(), Net(1)
    module.mean, fresh.mean = torch.ones(5), torch.zeros(3)
    save(tmp_path, module)
    with pytest.raises(IncompatibleCheckpoint, match=r"buffers\.mean: \[3\] here, \[5\] in the checkpoint[\s\S]*"):
        resume(tmp_path, fresh)
    resume(tmp_path, fresh, how={"allow_resize": ["buffers.mean"]})
    assert torch.equal(fresh.mean, torch.ones(5))


def test_observers_take_the_shape_that_they_had(tmp_path):
    from torch.ao.quantization import PerChannelMinMaxObserver

    def observed(seed):
        module = Net(seed)
        module.observer = PerChannelMinMaxObserver()
        return module

    module, fresh = observed(0), observed(1)
    module.observer(torch.randn(4, 5))
    save(tmp_path, module)
    resume(tmp_path, fresh)
    assert torch.equal(fresh.observer.min_val, module.observer.min_val)


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_meta_tensors_are_refused_with_a_remedy(tmp_path, what):
    module = Net()
    if what == "parameter":
        with torch.device("meta"):
            module.last = nn.Linear(6, 3)
    else:
        module.mean = torch.empty(4, device="meta")
    with pytest.raises(UsageError, match=r"(last\.weight|mean) is on the meta device: it has no storage"):
        Checkpointer(tmp_path, module)


def test_parameters_that_were_replaced_by_assignment_are_an_error(tmp_path):
    module = Net()
    checkpointer = Checkpointer(tmp_path, module)
    module.load_state_dict(Net(1).state_dict(), assign=True)
    with pytest.raises(UsageError, match=r"parameters changed .* first\.weight.*load_state_dict\(assign=True\) does"):
        checkpointer.save(Progress(step=1))


class Unlisted(Net):
    """Trains with more than it lists."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("level", torch.zeros(2), persistent=False)
        self.calls, self.trace, self.setting = 0, torch.zeros(1), 3

    def forward(self, x):
        self.calls += 1
        self.level.add_(1)
        self.trace = self.trace + 1
        return super().forward(x)


def test_what_training_changes_and_nothing_lists_is_reported_once(tmp_path, caplog):
    module, optimizer = made(net=Unlisted)
    checkpointer = Checkpointer(tmp_path, (module, optimizer))
    checkpointer.save(Progress(step=1))
    assert "not saved" not in caplog.text, "nothing has changed yet"
    train(module, optimizer)
    checkpointer.save(Progress(step=2))
    checkpointer.save(Progress(step=3))
    assert caplog.text.count("not saved, since the module's state_dict() does not list it, though training changes it: ") == 1
    assert all(name in caplog.text for name in ("level", "calls", "trace"))
    assert "setting" not in caplog.text


# ------------------------------------------------------------------ optimizers


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Odd(torch.optim.Optimizer):
    """Momentum, and whatever ``keep(optimizer, parameter, number)`` puts anywhere at each step."""

    def __init__(self, params, lr=0.01, keep=lambda *_: None, **defaults):
        super().__init__(params, {"lr": lr, **defaults})
        self._keep = keep

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                self._keep(self, p, number)
                p.sub_(state["momentum"], alpha=group["lr"])


def group_int(optimizer, p, number):
    optimizer.param_groups[0]["step"] = optimizer.param_groups[0].get("step", 0) + 1


def group_tensor(optimizer, p, number):
    optimizer.param_groups[0].setdefault("step", torch.zeros(())).add_(1)


def group_more(optimizer, p, number):
    optimizer.param_groups[0].update(
        norms=[torch.ones(1) * number, None], dtype=torch.bfloat16, rate=np.float64(0.5), names={"a", "b"}, pair=(1, 2.5), at=torch.ones(3)
    )


def loose(optimizer, p, number):
    optimizer.state["k"] = torch.tensor([number])
    optimizer.state["counts"] = {"total": number, "seen": [torch.ones(2)]}


def nested(optimizer, p, number):
    state = optimizer.state[p]
    state["factors"] = [torch.full((2, 2), float(number)), {"inverse": torch.full((300, 100), 2.0), "at": (1, None)}]
    state["window"] = collections.deque([torch.ones(2), 3], maxlen=4)
    state["by_rate"] = {0.9: torch.zeros_like(p)}


def ones(optimizer, p, number):
    state = optimizer.state[p]
    state.setdefault("step", torch.zeros(1)).add_(1)
    state.setdefault("count", torch.zeros((1, 1), dtype=torch.int64)).add_(1)


def numbers(optimizer, p, number):
    optimizer.state[p].update(step=optimizer.state[p].get("step", 0) + 1, name="w", flag=True, none=None, big=2**70, z=1 + 2j, rate=np.float32(0.1))


def empty(optimizer, p, number):
    optimizer.state[p] if number else optimizer.state[p].clear()
    if not number:
        optimizer.state[p] = {}


def turned(optimizer, p, number):
    """As eigenvectors lie: columns one after another, which sums of them depend on."""
    state = optimizer.state[p]
    state["vectors"] = torch.arange(12.0).view(3, 4).t()
    state["more"] = [torch.arange(60000.0).view(2, 300, 100).permute(2, 0, 1)]


def strides(optimizer):
    found = [state for state in optimizer.state.values() if isinstance(state, dict) and "vectors" in state]
    return [(state["vectors"].stride(), state["more"][0].stride()) for state in found]


def float_step(optimizer, p, number):
    optimizer.state[p]["step"] = optimizer.state[p].get("step", 0.0) + 1.0


def parameter(optimizer, p, number):
    optimizer.state[p]["own"] = [nn.Parameter(torch.ones(2) * number, requires_grad=False)]


KEEPS = [turned, float_step, parameter, group_int, group_tensor, group_more, loose, nested, ones, numbers]


def whole_state(optimizer):
    """State and groups with their own types, without parameters."""
    state = {key if isinstance(key, str) else "": value for key, value in optimizer.state.items() if isinstance(key, str)}
    by_parameter = [optimizer.state.get(p) for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: group[k] for k in sorted(group) if k != "params"} for group in optimizer.param_groups]
    return [state, [dict(sorted(entry.items())) if entry is not None else None for entry in by_parameter], groups]


@pytest.mark.parametrize("keep", KEEPS)
def test_whatever_an_optimizer_keeps_comes_back_as_the_type_it_was(tmp_path, keep):
    module, optimizer = made(0, Odd, keep=keep)
    train(module, optimizer, steps=3)
    save(tmp_path, module, optimizer)
    fresh, fresh_optimizer = made(1, Odd, keep=keep)
    resume(tmp_path, fresh, fresh_optimizer, how={"verify": "all"})
    assert alike(whole_state(fresh_optimizer), whole_state(optimizer))
    assert strides(fresh_optimizer) == strides(optimizer)
    train(fresh, fresh_optimizer), train(module, optimizer)
    assert torch.equal(fresh.last.weight, module.last.weight)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_resume_of_an_earlier_step_leaves_nothing_of_a_later_one(tmp_path, keep):
    module, optimizer = made(0, Odd, keep=keep)
    save(tmp_path, module, optimizer)  # before the first step
    before = whole_state(optimizer)
    train(module, optimizer, steps=2)
    resume(tmp_path, module, optimizer)
    assert alike(whole_state(optimizer), before)


def test_an_object_in_an_optimizers_state_is_refused_at_the_end_of_the_first_step(tmp_path):
    def keep(optimizer, p, number):
        optimizer.state[p]["projector"] = object()

    module, optimizer = made(0, Odd, keep=keep)
    Checkpointer(tmp_path, (module, optimizer))
    with pytest.raises(UsageError, match=r"Odd, state of first\.weight: first\.weight\.projector is a builtins\.object"):
        train(module, optimizer)


def test_an_enum_of_the_constructor_comes_back(tmp_path):
    module, optimizer = made(0, Odd, mode=Mode.FAST)
    optimizer.param_groups[0]["mode"] = Mode.SLOW
    save(tmp_path, module, optimizer)
    fresh, fresh_optimizer = made(1, Odd, mode=Mode.FAST)
    resume(tmp_path, fresh, fresh_optimizer)
    assert fresh_optimizer.param_groups[0]["mode"] is Mode.SLOW


def test_state_of_a_tensor_that_no_group_holds_is_refused(tmp_path):
    module, optimizer = made(0, Odd)
    optimizer.state[torch.zeros(7)] = {"momentum": torch.zeros(7)}
    with pytest.raises(UsageError, match=r"Odd keeps a state for a tensor of shape \[7\] that is in none of its param groups"):
        Checkpointer(tmp_path, (module, optimizer))


class Sam(torch.optim.Optimizer):
    """As it is passed around: the inner optimizer's state is in no state dict."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.Adam(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["ascent"] = p.grad.sign() * 0.01
        self.base_optimizer.step()


class Listed(Odd):
    """Lists a counter of its own besides states and groups."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        self.param_groups[0]["lr"] = 0.01 / self.calls
        super().step()

    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls, "window": [torch.ones(2) * self.calls]}

    def load_state_dict(self, state):
        self.calls = state["calls"]
        super().load_state_dict({"state": state["state"], "param_groups": state["param_groups"]})


class Drawing(Odd):
    """Counts and draws in attributes that it does not list."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.calls, self.generator = 0, torch.Generator().manual_seed(3)

    def step(self, closure=None):
        self.calls += 1
        noise = torch.rand((), generator=self.generator).item()
        self.param_groups[0]["lr"] = 0.01 * noise / self.calls
        super().step()


class Duck:
    """Not a torch optimizer, though it acts like one."""

    def __init__(self, params, lr=0.01):
        self.inner, self.steps = torch.optim.Adam(params, lr=lr), 0

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self):
        self.steps += 1
        self.inner.step()

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])
        self.steps = state["steps"]


@pytest.mark.parametrize("kind", [Sam, Listed, Drawing, Duck, torch.optim.LBFGS])
def test_optimizers_with_more_than_state_and_groups_go_on_exactly(tmp_path, kind):
    def run(module, optimizer, steps):
        if kind is not torch.optim.LBFGS:
            return train(module, optimizer, steps=steps)

        def closure():
            optimizer.zero_grad()
            loss = module(torch.ones(2, 4)).square().mean()
            loss.backward()
            return loss

        return [float(optimizer.step(closure).detach()) for _ in range(steps)]

    module, optimizer = made(0, kind)
    run(module, optimizer, 3)
    save(tmp_path, module, optimizer)
    expected = run(module, optimizer, 3)
    fresh, fresh_optimizer = made(1, kind)
    resume(tmp_path, fresh, fresh_optimizer, how={"verify": "all"})
    assert run(fresh, fresh_optimizer, 3) == expected
    assert getattr(fresh_optimizer, "steps", 0) == getattr(optimizer, "steps", 0)


@pytest.mark.parametrize("how", ["tuple", "list", "dict"])
def test_several_optimizers_and_schedulers_of_one_module(tmp_path, how):
    def member(seed):
        module = Net(seed)
        a = torch.optim.SGD(module.first.parameters(), lr=0.1, momentum=0.9)
        b = torch.optim.AdamW(module.last.parameters())
        schedules = [lr.StepLR(a, 1, gamma=0.5), lr.ExponentialLR(b, 0.9)]
        given = {"tuple": (module, a, b, *schedules), "list": (module, [a, b], schedules), "dict": (module, {"a": a, "b": b}, schedules)}
        return given[how], module, (a, b), schedules

    def run(module, optimizers, schedules):
        losses = train(module, *optimizers, steps=3)
        for schedule in schedules:
            schedule.step()
        return losses + [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    given, *parts = member(0)
    run(*parts)
    Checkpointer(tmp_path, given).save(Progress(step=1))
    expected = run(*parts)
    given, *fresh = member(1)
    Checkpointer(tmp_path, given).resume()
    assert run(*fresh) == expected


def test_one_optimizer_per_parameter(tmp_path):
    def member(seed):
        module = Net(seed)
        return module, {p: torch.optim.Adam([p], lr=0.01) for p in module.parameters()}

    module, optimizers = member(0)
    train(module, *optimizers.values(), steps=2)
    Checkpointer(tmp_path, (module, optimizers)).save(Progress(step=1))
    fresh, fresh_optimizers = member(1)
    Checkpointer(tmp_path, (fresh, fresh_optimizers)).resume()
    assert train(fresh, *fresh_optimizers.values(), steps=2) == train(module, *optimizers.values(), steps=2)


def test_a_different_number_of_optimizers_is_refused(tmp_path):
    module = Net()
    save(tmp_path, module, torch.optim.SGD(module.first.parameters(), lr=0.1), torch.optim.AdamW(module.last.parameters()))
    with pytest.raises(IncompatibleCheckpoint, match=r"1 optimizers here \(SGD\), 2 in the checkpoint \(SGD, AdamW\)"):
        resume(tmp_path, *made(1, torch.optim.SGD))


def test_what_is_neither_an_optimizer_nor_a_scheduler_is_refused_by_its_class(tmp_path):
    module, optimizer = made()
    with pytest.raises(UsageError, match=r"a torch\.amp\.grad_scaler\.GradScaler is neither an optimizer nor a learning-rate scheduler"):
        Checkpointer(tmp_path, (module, optimizer, torch.amp.GradScaler("cpu")))


def test_an_optimizer_that_accelerate_has_prepared_is_unwrapped(tmp_path):
    from accelerate import Accelerator

    def prepared(seed):
        module, optimizer = made(seed)
        return Accelerator(cpu=True).prepare(module, optimizer, lr.ExponentialLR(optimizer, 0.5))

    module, optimizer, scheduler = prepared(0)
    train(module, optimizer, steps=2, scheduler=scheduler)
    save(tmp_path, module, optimizer, scheduler)
    fresh = prepared(1)
    resume(tmp_path, *fresh)
    assert alike(whole_state(fresh[1].optimizer), whole_state(optimizer.optimizer))


def test_a_param_group_added_in_mid_run_is_saved_and_asked_for(tmp_path):
    def member(seed):
        module = Net(seed)
        return module, torch.optim.AdamW(module.first.parameters(), lr=0.01)

    module, optimizer = member(0)
    checkpointer = Checkpointer(tmp_path, (module, optimizer))
    train(module, optimizer)
    optimizer.add_param_group({"params": list(module.last.parameters()), "lr": 0.1})
    train(module, optimizer)
    checkpointer.save(Progress(step=1))
    with pytest.raises(IncompatibleCheckpoint, match=r"optim\.state\.last\.weight\.exp_avg"):
        resume(tmp_path, *member(1))
    fresh, fresh_optimizer = member(1)
    fresh_optimizer.add_param_group({"params": list(fresh.last.parameters()), "lr": 0.5})
    resume(tmp_path, fresh, fresh_optimizer)
    assert alike(whole_state(fresh_optimizer), whole_state(optimizer))


# ------------------------------------------------------------------ members


class Holder:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


def trained_pair():
    module, optimizer = made(0)
    train(module, optimizer, steps=2)
    return module, optimizer


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_grad_scaler_that_is_enabled_or_disabled_is_refused_before_anything_changes_or_allowed(tmp_path, before, after):
    def scaler(enabled):
        return torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)

    save(tmp_path, *trained_pair(), scaler=scaler(before))
    module, optimizer = made(1)
    weight, kept = module.last.weight.detach().clone(), "allow_missing" if after else "allow_unexpected"
    with pytest.raises(IncompatibleCheckpoint, match=rf"member 'scaler' \(GradScaler\) .*{kept}=\['scaler'\]"):
        resume(tmp_path, module, optimizer, scaler=scaler(after))
    assert torch.equal(weight, module.last.weight)
    fresh = scaler(after)
    resume(tmp_path, module, optimizer, scaler=fresh, how={kept: ["scaler"]})
    assert fresh.get_scale() == (1024.0 if after else 1.0)


class Fails(Holder):
    def load_state_dict(self, state):
        raise ValueError("not this one")


def test_a_member_that_does_not_load_leaves_the_weights_alone(tmp_path):
    save(tmp_path, *trained_pair(), a=Holder(x=1), b=Holder(x=torch.ones(3)))
    module, optimizer = made(1)
    weight, first = module.last.weight.detach().clone(), Holder(x=0)
    with pytest.raises(Exception, match="not this one") as caught:
        resume(tmp_path, module, optimizer, a=first, b=Fails(x=torch.zeros(3)))
    assert torch.equal(weight, module.last.weight)
    assert not optimizer.state
    assert any("No weight has changed. Restored before the failure: a" in note for note in caught.value.__notes__)


class Forgets(Holder):
    def load_state_dict(self, state):
        self.state = {**state, "moved": self.state["moved"]}


def test_a_resume_that_does_not_bring_back_what_was_saved_is_an_error_naming_it(tmp_path):
    save(tmp_path, *trained_pair(), ema=Holder(moved=3, decay=0.9))
    with pytest.raises(IncompatibleCheckpoint, match=r"ema\.moved: 3 in the checkpoint, 0 after the resume"):
        resume(tmp_path, *made(1), ema=Forgets(moved=0, decay=0.5))
    resume(tmp_path, *made(1), ema=Forgets(moved=0, decay=0.5), how={"allow_changed": ["ema.moved"]})


class Overwrites(Holder):
    """An average that goes into the model when it is loaded, as some do."""

    def __init__(self, module):
        super().__init__(mean=torch.zeros(3, 6))
        self.module, self.late = module, False

    def state_dict(self):
        if self.late:
            with torch.no_grad():
                self.module.last.weight.zero_()
        return super().state_dict()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.late = True


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_a_member_that_changes_the_weights_it_was_resumed_with_is_noticed(tmp_path, verify):
    module, optimizer = trained_pair()
    save(tmp_path, module, optimizer, ema=Overwrites(module))
    fresh, fresh_optimizer = made(1)
    with pytest.raises(IncompatibleCheckpoint, match=r"model\.last\.weight: one value in the checkpoint"):
        resume(tmp_path, fresh, fresh_optimizer, ema=Overwrites(fresh), how={"verify": verify})


def test_words_that_are_not_known_and_texts_for_lists_are_refused(tmp_path):
    save(tmp_path, Net())
    with pytest.raises(UsageError, match="verify='some' is not known; use one of 'sample', 'all', 'off'"):
        resume(tmp_path, Net(), how={"verify": "some"})
    with pytest.raises(UsageError, match=r"allow_missing='optim\.\*': give a list of texts"):
        resume(tmp_path, Net(), how={"allow_missing": "optim.*"})
    with pytest.raises(UsageError, match=r"override='lr': give a list of texts, override=\['lr'\]"):
        resume(tmp_path, Net(), how={"override": "lr"})


def test_settings_of_a_schedule_are_the_checkpoints_unless_overridden(tmp_path, caplog):
    def member(seed, peak, total):
        module, optimizer = made(seed)
        return module, optimizer, lr.OneCycleLR(optimizer, max_lr=peak, total_steps=total)

    module, optimizer, scheduler = member(0, 0.1, 20)
    train(module, optimizer, steps=3, scheduler=scheduler)
    save(tmp_path, module, optimizer, scheduler)
    expected = [scheduler.step() or optimizer.param_groups[0]["lr"] for _ in range(4)]
    with caplog.at_level(logging.WARNING, "engine"):
        _, fresh, fresh_scheduler = given = member(1, 0.4, 50)
        resume(tmp_path, *given)
    assert [fresh_scheduler.step() or fresh.param_groups[0]["lr"] for _ in range(4)] == expected
    assert "OneCycleLR: total_steps is 50 here and 20 in the checkpoint; the checkpoint's is used" in caplog.text
    assert "AdamW, param group 0: max_lr is 0.4 here and 0.1 in the checkpoint; the checkpoint's is used" in caplog.text
    _, fresh, fresh_scheduler = given = member(1, 0.4, 50)
    resume(tmp_path, *given, how={"override": ("total_steps", "max_lr")})
    assert (fresh_scheduler.total_steps, fresh.param_groups[0]["max_lr"], fresh_scheduler.last_epoch) == (50, 0.4, 3)


# ------------------------------------------------------------------ surroundings


def default_dtype(dtype):
    before = torch.get_default_dtype()

    class Scope:
        def __enter__(self):
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(before)

    return Scope()


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("in_flight", [0, 2])
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_what_the_caller_has_switched_on_changes_nothing(tmp_path, around, in_flight):
    def keep(*given):
        numbers(*given), nested(*given), group_tensor(*given)

    module, optimizer = made(0, Odd, keep=keep)
    train(module, optimizer, steps=2)
    for state in optimizer.state.values():
        state["step"] += 300  # beyond what bf16 counts in ones
    average = Holder(mean=torch.ones(3), seen=3)
    with SURROUNDINGS[around]():
        checkpointer = Checkpointer(tmp_path, (module, optimizer), ema=average, max_in_flight=in_flight)
        checkpointer.save(Progress(step=1))
        checkpointer.close()
    fresh, fresh_optimizer = made(1, Odd, keep=keep)
    fresh_average = Holder(mean=torch.zeros(3), seen=0)
    with SURROUNDINGS[around]():
        checkpointer = Checkpointer(tmp_path, (fresh, fresh_optimizer), ema=fresh_average, max_in_flight=in_flight)
        checkpointer.resume(verify="all")
        checkpointer.close()
    assert alike(whole_state(fresh_optimizer), whole_state(optimizer))
    assert alike(fresh_average.state, average.state)
    assert not fresh_average.state["mean"].is_inference()
    assert train(fresh, fresh_optimizer) == train(module, optimizer)


def test_counts_beyond_float32_are_exact(tmp_path):
    module, optimizer = made(0, Odd, keep=numbers)
    train(module, optimizer)
    checkpointer = Checkpointer(tmp_path, (module, optimizer))
    checkpointer.save(Progress(step=1))
    for state in optimizer.state.values():
        state["step"] = 2**24 + 1
    checkpointer.save(Progress(step=2))
    fresh, fresh_optimizer = made(1, Odd, keep=numbers)
    resume(tmp_path, fresh, fresh_optimizer)
    assert {state["step"] for state in fresh_optimizer.state.values()} == {2**24 + 1}


# ------------------------------------------------------------------ accounting itself

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3]), range(3), np.float32(1.5), np.int64(7)]),
    st.sampled_from([(), (1,), (3,), (2, 0), (200, 100)]).map(lambda shape: torch.arange(float(np.prod(shape))).reshape(shape)),
    st.sampled_from([torch.bfloat16, torch.int64, torch.bool, torch.uint8]).map(lambda dtype: torch.ones(3, dtype=dtype)),
    st.just(np.arange(4).reshape(2, 2)),
    st.builds(object),
    st.just(Mode.FAST),
    st.builds(lambda: iter([1])),
    st.just(collections.namedtuple("Pair", "a b")(1, 2)),
)
PIECES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["x", 1, 0.5, (1, "y"), True]), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, maxlen=5)),
    ),
    max_leaves=6,
)
PLACES = ("extra", "group", "state", "loose", "schedule", "member")


def placed(place, piece, seed):
    """A member with a piece of state somewhere, if one is given."""
    module, optimizer = made(seed, Odd, net=Scaled)
    train(module, optimizer)
    scheduler, holder = lr.ConstantLR(optimizer), Holder(known=1)
    if piece is not None:
        value = piece[0]
        put = {
            "extra": lambda: module.kept.update(piece=value),
            "group": lambda: optimizer.param_groups[0].update(piece=value),
            "state": lambda: optimizer.state[module.last.weight].update(piece=value),
            "loose": lambda: optimizer.state.update(piece=value),
            "schedule": lambda: setattr(scheduler, "piece", value),
            "member": lambda: holder.state.update(piece=value),
        }
        put[place]()
    find = {
        "extra": lambda: module.kept,
        "group": lambda: optimizer.param_groups[0],
        "state": lambda: optimizer.state[module.last.weight],
        "loose": lambda: optimizer.state,
        "schedule": lambda: vars(scheduler),
        "member": lambda: holder.state,
    }
    return (module, optimizer, scheduler), holder, find[place]


@given(place=st.sampled_from(PLACES), piece=PIECES)
def test_a_piece_of_state_anywhere_is_back_or_was_named(tmp_path_factory, place, piece):
    run = tmp_path_factory.mktemp("run")
    member, holder, _ = placed(place, (piece,), 0)
    try:
        Checkpointer(run, member, holder=holder).save(Progress(step=1))
    except EngineError as e:
        assert "piece" in str(e), "the refusal does not say where it is"  # noqa: PT017
        return
    member, holder, find = placed(place, None, 1)
    Checkpointer(run, member, holder=holder).resume()
    assert "piece" in find(), "it was lost, and nothing said so"
    assert alike(find()["piece"], piece)
