"""Checkpointer on one process: what is restored, and that a refusal comes before anything changes."""

import copy

import pytest
import torch
from torch import nn

from engine import ElasticSampler, Progress
from engine.errors import CheckpointCorrupt, CheckpointNotFound, IncompatibleCheckpoint, LayoutError, UsageError
from tests.now import Checkpointer


def model(seed: int, *extra: tuple[str, torch.Tensor]) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 3))
    for name, buffer in extra:
        made.register_buffer(name, buffer)
    return made


def train(made: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler=None) -> list[float]:
    losses = []
    for number in range(steps):
        loss = made(torch.randn(5, 7, generator=torch.Generator().manual_seed(number))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "capturable_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("own_steps", [0, 2])
def test_every_optimizer_continues_bitwise(tmp_path, name, own_steps):
    made = model(0)
    optimizer = OPTIMIZERS[name](made.parameters())
    train(made, optimizer, 3)
    Checkpointer(tmp_path, (made, optimizer)).save(Progress(step=3))
    reference = train(made, optimizer, 3)

    other = model(1)
    other_optimizer = OPTIMIZERS[name](other.parameters())
    train(other, other_optimizer, own_steps)
    checkpointer = Checkpointer(tmp_path, (other, other_optimizer))
    assert checkpointer.resume().step == 3
    assert checkpointer.max_difference() == 0.0
    assert train(other, other_optimizer, 3) == reference


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_continue_at_their_position(tmp_path, name):
    def run(seed: int):
        made = model(seed)
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        return made, optimizer, SCHEDULERS[name](optimizer)

    made, optimizer, scheduler = run(0)
    train(made, optimizer, 5, scheduler)
    Checkpointer(tmp_path, (made, optimizer, scheduler)).save(Progress(step=5))
    reference = train(made, optimizer, 4, scheduler)
    made, optimizer, scheduler = run(1)
    Checkpointer(tmp_path, (made, optimizer, scheduler)).resume()
    assert train(made, optimizer, 4, scheduler) == reference


def test_another_class_of_scheduler_starts_at_the_same_step(tmp_path, caplog):
    made, optimizer = model(0), torch.optim.AdamW(model(0).parameters())
    optimizer = torch.optim.AdamW(made.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(made, optimizer, 5, scheduler)
    Checkpointer(tmp_path, (made, optimizer, scheduler)).save(Progress(step=5))
    from deepspeed.runtime.lr_schedules import WarmupLR

    theirs = WarmupLR(optimizer, warmup_num_steps=100)
    Checkpointer(tmp_path, (made, optimizer, theirs)).resume()
    assert theirs.last_batch_iteration == 4  # DeepSpeed's count from -1
    assert "goes on from the same step" in caplog.text


def test_hyper_parameters_come_from_the_checkpoint_by_name(tmp_path):
    made = model(0)
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(made.parameters())]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    Checkpointer(tmp_path, (made, optimizer)).save(Progress(step=1))
    other = model(1)
    backwards = [{"params": [p], "lr": 9.0} for p in reversed(list(other.parameters()))]
    turned = torch.optim.SGD(backwards, lr=9.0)
    Checkpointer(tmp_path, (other, turned)).resume()
    assert [g["lr"] for g in turned.param_groups] == [g["lr"] for g in reversed(optimizer.param_groups)]


def test_named_groups_can_be_merged(tmp_path):
    made = model(0)
    named = list(made.named_parameters())
    optimizer = torch.optim.AdamW([{"params": named[:2]}, {"params": named[2:]}])
    Checkpointer(tmp_path, (made, optimizer)).save(Progress(step=1))
    other = model(1)
    merged = torch.optim.AdamW(other.named_parameters())
    Checkpointer(tmp_path, (other, merged)).resume()
    assert merged.param_groups[0]["param_names"] == [name for name, _ in other.named_parameters()]


def test_tied_weights_and_buffers_load_into_an_untied_model(tmp_path):
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            shared = torch.randn(3)
            self.a.register_buffer("x", shared)
            self.b.register_buffer("x", shared if tied else torch.randn(3))
            if tied:
                self.b.weight = self.a.weight

    source, target = Tied(True), Tied(False)
    Checkpointer(tmp_path, source).save(Progress(step=1))
    Checkpointer(tmp_path, target).resume()
    assert torch.equal(target.b.weight, source.a.weight)
    assert torch.equal(target.b.x, source.a.x)


def test_awkward_tensors_come_back(tmp_path):
    extra = [
        ("empty", torch.empty(0, dtype=torch.int64)),
        ("empty2", torch.empty(3, 0, dtype=torch.float64)),
        ("flag", torch.tensor(True)),
        ("count", torch.tensor(2**53 + 1)),
        ("complex", torch.tensor([1 + 2j, float("nan") + 0j], dtype=torch.complex128)),
        ("scale", torch.ones(4, 2, dtype=torch.float8_e8m0fnu)),
        ("turned", torch.arange(12.0).view(3, 4).t()),
        ("fp16", torch.tensor([1.5, float("-inf")], dtype=torch.float16)),
    ]
    made, other = model(0, *extra), model(1, *[(name, torch.zeros_like(t)) for name, t in extra])
    Checkpointer(tmp_path, made).save(Progress(step=1))
    Checkpointer(tmp_path, other).resume()
    for name, tensor in extra:
        found = other.get_buffer(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
        assert found.shape == tensor.shape


def test_a_large_tensor_that_is_not_contiguous_is_filled(tmp_path):
    big = torch.arange(5_000_000, dtype=torch.float32).view(2000, 2500).t()
    made, other = model(0, ("big", big)), model(1, ("big", torch.zeros(2000, 2500).t()))
    Checkpointer(tmp_path, made).save(Progress(step=1))
    Checkpointer(tmp_path, other).resume()
    assert torch.equal(other.get_buffer("big"), big)


def test_an_expanded_buffer_is_refused_on_attach(tmp_path):
    with pytest.raises(LayoutError, match="expanded view"):
        Checkpointer(tmp_path, model(0, ("wide", torch.zeros(1).expand(5))))


def test_saved_without_an_optimizer_its_state_counts_as_missing(tmp_path):
    Checkpointer(tmp_path, model(0)).save(Progress(step=1))
    made = model(1)
    optimizer = torch.optim.AdamW(made.parameters())
    train(made, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    checkpointer = Checkpointer(tmp_path, (made, optimizer))
    with pytest.raises(IncompatibleCheckpoint, match=r"optim\.state\.0\.weight\.\*"):
        checkpointer.resume()
    checkpointer.resume(allow_missing=["optim.*"])
    assert torch.equal(made[0].weight, model(0)[0].weight)
    assert optimizer.state_dict()["state"][0]["step"] == before["state"][0]["step"]


@pytest.mark.parametrize(
    ("metrics", "progress"),
    [({"loss": None}, Progress(step=1)), ({}, Progress(step=1, history=[{"note": "x"}])), ({}, Progress(step=1.5))],  # type: ignore[arg-type, list-item]
)
def test_progress_that_no_resume_could_read_is_refused_by_the_save(tmp_path, metrics, progress):
    with pytest.raises(UsageError, match="whole numbers"):
        Checkpointer(tmp_path, model(0)).save(progress, metrics=metrics)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("step", ".step"))]


@pytest.mark.parametrize("where", ["metrics", "history"])
def test_a_name_of_a_metric_that_is_no_text_is_refused_by_the_save(tmp_path, where):
    metrics, history = ({"\ud800": 1.0}, []) if where == "metrics" else ({}, [{"\ud800": 1.0}])
    with pytest.raises(UsageError, match=r"entry 0 of the history has a name that UTF-8 cannot carry .*ud800"):
        Checkpointer(tmp_path, model(0)).save(Progress(step=1, history=history), metrics=metrics)


def test_a_resumed_run_saves_the_entries_that_it_resumed(tmp_path):
    progress, checkpointer = Progress(), Checkpointer(tmp_path, model(0))
    for progress.step in (1, 2, 3):
        checkpointer.save(progress, metrics={"loss": 0.5})
    again = Checkpointer(tmp_path, model(1))
    resumed = again.resume()
    before = list(resumed.history)
    resumed.step = 4
    again.save(resumed, metrics={"loss": 0.25})
    assert all(a is b for a, b in zip(resumed.history, before, strict=False)), "checked again"
    assert Checkpointer(tmp_path, model(2)).resume() == resumed


def test_numpy_numbers_are_taken_as_numbers(tmp_path):
    import numpy as np

    checkpointer = Checkpointer(tmp_path, model(0))
    checkpointer.save(Progress(step=np.int64(3)), metrics={"loss": np.float32(0.5)})  # type: ignore[arg-type]
    assert checkpointer.resume() == Progress(step=3, metrics={"loss": 0.5}, history=[{"epoch": 0.0, "step": 3.0, "loss": 0.5}])


def test_refusals_come_before_anything_changes(tmp_path):
    """Of hyper-parameters that one group cannot hold, and of another data order."""
    made = model(0)
    first, second = list(made.parameters())[:2], list(made.parameters())[2:]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}], lr=1.0)
    Checkpointer(tmp_path, (made, optimizer), data=ElasticSampler(range(10), 2, seed=1)).save(Progress(step=1))
    for groups, seed, message in (([{"params": first + second}], 1, "different lr"), (None, 2, "data order differs")):
        other = model(1)
        before = copy.deepcopy(other.state_dict())
        parameters = list(other.parameters())
        split = [{"params": parameters}] if groups else [{"params": parameters[:2]}, {"params": parameters[2:]}]
        target = torch.optim.SGD(split, lr=1.0)
        with pytest.raises(IncompatibleCheckpoint, match=message) as refused:
            Checkpointer(tmp_path, (other, target), data=ElasticSampler(range(10), 2, seed=seed)).resume()
        assert "partly overwritten" not in str(refused.value)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


def test_a_resume_drops_gradients_of_the_replaced_weights(tmp_path):
    made = model(0)
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    checkpointer = Checkpointer(tmp_path, (made, optimizer))
    checkpointer.save(Progress(step=1))
    made(torch.ones(1, 7)).sum().backward()
    checkpointer.resume()
    assert all(p.grad is None for p in made.parameters())


def test_an_existing_step_is_replaced(tmp_path):
    made = model(0)
    checkpointer = Checkpointer(tmp_path, made)
    checkpointer.save(Progress(step=1))
    with torch.no_grad():
        made[0].weight.fill_(5.0)
    checkpointer.save(Progress(step=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease_00000001", "latest", "run.json", "step_00000001"]
    other = model(1)
    Checkpointer(tmp_path, other).resume("step:1")
    assert torch.equal(other[0].weight, made[0].weight)


def test_a_step_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.storage.local._exchange", lambda *_: False)
    checkpointer = Checkpointer(tmp_path, model(0))
    checkpointer.save(Progress(step=1, epoch=1))
    checkpointer.save(Progress(step=1, epoch=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease_00000001", "latest", "run.json", "step_00000001"]
    assert checkpointer.resume().epoch == 2


def test_missing_runs_by_policy(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path / "none", model(0))
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        checkpointer.resume()
    assert checkpointer.resume(missing="fresh") == Progress()
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "STARTING FRESH" in told
    assert f"{tmp_path}/none does not exist" in told
    with pytest.raises(CheckpointNotFound, match="step 7"):
        checkpointer.resume("step:7", missing="fresh")


@pytest.mark.parametrize("member", [3, "model", (1, 2), nn.Linear])
def test_a_member_of_no_known_kind_is_refused(tmp_path, member):
    with pytest.raises(UsageError, match="DeepSpeed engine, a module"):
        Checkpointer(tmp_path, thing=member)


def test_members_keep_their_names_apart(tmp_path):
    generator, critic = model(0), model(1)
    Checkpointer(tmp_path, generator=generator, critic=(critic, torch.optim.SGD(critic.parameters(), lr=0.1))).save(Progress(step=1))
    others = model(2), model(3)
    Checkpointer(tmp_path, generator=others[0], critic=(others[1], torch.optim.SGD(others[1].parameters(), lr=0.1))).resume()
    assert torch.equal(others[0][0].weight, generator[0].weight)
    assert torch.equal(others[1][0].weight, critic[0].weight)


def test_a_fresh_optimizer_is_not_passed_over_in_silence(tmp_path, caplog):
    Checkpointer(tmp_path, model(0)).save(Progress(step=1))
    made = model(1)
    optimizer = torch.optim.AdamW(made.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    checkpointer = Checkpointer(tmp_path, (made, optimizer, scheduler))
    with pytest.raises(IncompatibleCheckpoint, match=r"optim\.state\."):
        checkpointer.resume()
    checkpointer.resume(allow_missing=["optim.*"])
    assert "has a learning-rate scheduler and the checkpoint has none" in caplog.text


def test_a_state_that_is_none_here_is_filled(tmp_path):
    made = model(0)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    train(made, optimizer, 2)
    Checkpointer(tmp_path, (made, optimizer)).save(Progress(step=2))
    reference = train(made, optimizer, 2)
    other = model(1)
    target = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for p in other.parameters():
        target.state[p]["momentum_buffer"] = None
    Checkpointer(tmp_path, (other, target)).resume()
    assert train(other, target, 2) == reference


def test_states_of_another_dtype_than_the_parameter_come_back(tmp_path):
    class Fp32Momentum(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros(p.shape, dtype=torch.float32)
                    state["precondition"] = torch.eye(p.shape[-1] + 3)  # larger than the parameter
                state["m"].mul_(0.9).add_(p.grad.float())
                p.sub_((state["m"] * 0.1).to(p.dtype))

    def run(seed: int):
        torch.manual_seed(seed)
        made = nn.Linear(4, 3, dtype=torch.bfloat16)
        return made, Fp32Momentum(made.parameters())

    def step(made, optimizer) -> torch.Tensor:
        made(torch.ones(2, 4, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return made.weight.detach().clone()

    made, optimizer = run(0)
    step(made, optimizer)
    Checkpointer(tmp_path, (made, optimizer)).save(Progress(step=1))
    reference = step(made, optimizer)
    made, optimizer = run(1)
    Checkpointer(tmp_path, (made, optimizer)).resume()
    assert optimizer.state[made.weight]["m"].dtype == torch.float32
    assert torch.equal(step(made, optimizer), reference)


def test_nothing_is_saved_after_a_load_that_failed_halfway(tmp_path):
    made = model(0)
    checkpointer = Checkpointer(tmp_path, made)
    checkpointer.save(Progress(step=1))
    checkpointer.save(Progress(step=2))
    shard = tmp_path / "step_00000002/rank_00000.0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="partly overwritten"):
        checkpointer.resume("step:2")
    with pytest.raises(UsageError, match="failed halfway"):
        checkpointer.save(Progress(step=3))
    checkpointer.resume("step:1")
    checkpointer.save(Progress(step=3))


def test_large_tensors_are_filled_and_verified_however_they_lie(tmp_path):
    """Read straight into a contiguous target, or through the buffer into one that is not; a flip is found either way."""
    size = (1500, 1111)  # 6.7 MB, blocks do not end with rows
    made = model(0, ("straight", torch.randn(size)), ("turned", torch.randn(size).t()))
    Checkpointer(tmp_path, made).save(Progress(step=1))
    other = model(1, ("straight", torch.zeros(size)), ("turned", torch.zeros(size).t()))
    Checkpointer(tmp_path, other).resume()
    for name in ("straight", "turned"):
        assert torch.equal(other.get_buffer(name), made.get_buffer(name))
    shard = tmp_path / "step_00000001/rank_00000.0.safetensors"
    sound = shard.read_bytes()
    for at in (0.2, 0.7):
        data = bytearray(sound)
        data[int(len(data) * at)] ^= 1
        shard.write_bytes(data)
        with pytest.raises(CheckpointCorrupt, match=r"buffers\.(straight|turned) .* checksum"):
            Checkpointer(tmp_path, other).resume()
