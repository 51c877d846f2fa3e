"""What a resumed run takes from the checkpoint, what from its own command line, and that the differences are told."""

import json
import logging

import numpy as np
import pytest
import torch

from engine import Progress
from engine.errors import CheckpointCorrupt, CheckpointNotFound, IncompatibleCheckpoint, UsageError
from tests.now import Checkpointer
from tests.test_checkpointer import model, train


def _with(lr: float, seed: int, decay: float = 0.01, schedule=None):
    made = model(seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, weight_decay=decay)
    scheduler = schedule(optimizer) if schedule else None
    return made, optimizer, scheduler


def _warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


def test_overridden_hyper_parameters_win_and_every_difference_is_told(tmp_path, caplog):
    saved = _with(1e-2, 0)
    train(saved[0], saved[1], 2)
    Checkpointer(tmp_path, saved[:2]).save(Progress(step=2))

    here = _with(5e-4, 1, decay=0.2)
    with caplog.at_level(logging.WARNING, "engine"):
        Checkpointer(tmp_path, here[:2]).resume(override=("lr",))
    assert here[1].param_groups[0]["lr"] == 5e-4
    assert here[1].param_groups[0]["weight_decay"] == 0.01
    assert torch.equal(here[1].state[here[0][0].weight]["exp_avg"], saved[1].state[saved[0][0].weight]["exp_avg"]), "moments are kept"
    assert "the model: AdamW, param group 0: lr is 0.0005 here and 0.01 in the checkpoint; this run's is used" in caplog.text
    assert "weight_decay is 0.2 here and 0.01 in the checkpoint; the checkpoint's is used (override=('weight_decay',)" in caplog.text


def test_an_overridden_rate_under_a_schedule_keeps_its_place_in_it(tmp_path, caplog):
    saved = _with(1e-2, 0, schedule=_warm_up)
    train(*saved[:2], 3, saved[2])
    Checkpointer(tmp_path, saved).save(Progress(step=3))

    here = _with(2e-3, 1, schedule=_warm_up)
    with caplog.at_level(logging.WARNING, "engine"):
        Checkpointer(tmp_path, here).resume(override=("lr",))
    rates = []
    for _ in range(9):
        rates.append(here[1].param_groups[0]["lr"])
        here[1].step()
        here[2].step()
    assert rates == pytest.approx([2e-3 * min(1.0, (step + 1) / 10) for step in range(3, 12)])
    assert "lr is 0.002 here and 0.01 in the checkpoint; this run's is used" in caplog.text

    unchanged = _with(1e-2, 2, schedule=_warm_up)
    caplog.clear()
    Checkpointer(tmp_path, unchanged).resume()
    assert unchanged[1].param_groups[0]["lr"] == saved[1].param_groups[0]["lr"]
    assert "here and" not in caplog.text, "a schedule's position is no difference"


def test_differences_of_the_config_are_told(tmp_path, caplog):
    Checkpointer(tmp_path, model(0), config={"lr": 1e-5, "data": "a.txt", "old": 1}).save(Progress(step=1))
    with caplog.at_level(logging.INFO, "engine"):
        Checkpointer(tmp_path, model(1), config={"lr": 5e-7, "data": "a.txt", "new": [2]}).resume()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("config")]
    assert lines == ["config: lr is 5e-07, was 1e-05", "config: new is [2], was not set", "config: old is not set, was 1"]


def test_best_history_and_patience_survive_and_go_on(tmp_path):
    progress, checkpointer = Progress(), Checkpointer(tmp_path, model(0), monitor="val", mode="max")
    for step, value in enumerate([0.5, 0.7, float("nan"), 0.6], 1):
        progress.step = step
        checkpointer.save(progress, metrics={"val": value})
    assert (progress.best.value, progress.best.step, progress.stale) == (0.7, 2, 2)  # type: ignore[union-attr]

    again = Checkpointer(tmp_path, model(1), monitor="val", mode="max")
    resumed = again.resume()
    assert repr(resumed) == repr(progress)
    resumed.step = 5
    again.save(resumed)  # between two evaluations
    assert resumed.stale == 2
    resumed.step = 6
    again.save(resumed, metrics={"val": 0.7})
    assert (resumed.best.step, resumed.stale) == (2, 3), "a tie is not better"  # type: ignore[union-attr]
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4, 6]
    best = Checkpointer(tmp_path, model(2), monitor="val", mode="max").resume("best")
    assert (best.step, best.metrics) == (2, {"val": 0.7})


def test_a_step_that_is_saved_again_is_one_entry_of_history(tmp_path):
    checkpointer, progress = Checkpointer(tmp_path, model(0), monitor="val"), Progress(step=1)
    checkpointer.save(progress, metrics={"val": 1.0})
    checkpointer.save(progress, metrics={"val": 2.0})
    assert progress.history == [{"epoch": 0.0, "step": 1.0, "val": 2.0}]
    assert progress.best.value == 2.0  # type: ignore[union-attr]


def test_a_monitor_that_is_not_among_the_metrics_is_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path, model(0), monitor="val_loss")
    with pytest.raises(UsageError, match=r"monitor='val_loss' is not among the metrics \['loss'\]"):
        checkpointer.save(Progress(step=1), metrics={"loss": 1.0})
    with pytest.raises(UsageError, match="mode is 'lowest'"):
        Checkpointer(tmp_path, model(0), monitor="val_loss", mode="lowest")
    checkpointer.save(Progress(step=1))  # before the first evaluation
    with pytest.raises(CheckpointNotFound):
        checkpointer.resume("best")


def test_retention_keeps_the_last_the_best_and_the_round_numbers(tmp_path):
    checkpointer = Checkpointer(tmp_path, model(0), keep_last=2, keep_every=4, keep_best=1, monitor="val")
    progress = Progress()
    for step, value in enumerate([0.5, 0.1, 0.9, 0.8, 0.7, 0.6, 0.65], 1):
        progress.step = step
        checkpointer.save(progress, metrics={"val": value})
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004", "step_00000006", "step_00000007"]
    assert Checkpointer(tmp_path, model(1), monitor="val").resume("best").step == 2
    assert len(progress.history) == 7, "history counts what retention has deleted"


def test_an_abandoned_line_is_never_taken_for_the_present(tmp_path):
    checkpointer, progress = Checkpointer(tmp_path, model(0), monitor="val", keep_last=2), Progress()
    for step, value in ((1, 0.9), (2, 0.5), (3, 0.1)):
        progress.step = step
        checkpointer.save(progress, metrics={"val": value})
    again = Checkpointer(tmp_path, model(1), monitor="val", keep_last=1)
    earlier = again.resume("step:2")
    earlier.step, earlier.epoch = 4, 0
    again.save(earlier, metrics={"val": 0.4})
    assert (tmp_path / "step_00000003").is_dir(), "retention leaves another line alone"
    last = Checkpointer(tmp_path, model(2), monitor="val")
    assert last.resume().step == 4
    assert last.resume("best").step == 4, "step 3 was better, but on the line that was left"
    earlier = last.resume("step:3")
    earlier.step = 4
    last.save(earlier, metrics={"val": 0.3})  # replaces the other line's step 4
    assert last.resume("best").step == 3


def test_a_damaged_newest_step_is_passed_over_with_a_warning_or_refused(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path, model(0))
    for step in (1, 2, 3):
        checkpointer.save(Progress(step=step))
    for step, name in ((3, "rank_00000.0.safetensors"), (2, "manifest")):
        path = tmp_path / f"step_{step:08d}" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="step_00000003"):
        Checkpointer(tmp_path, model(1)).resume(corrupt="error")
    with pytest.raises(CheckpointCorrupt, match="step_00000003"):
        Checkpointer(tmp_path, model(1)).resume("step:3")
    with caplog.at_level(logging.WARNING, "engine"):
        made = Checkpointer(tmp_path, model(1))
        assert made.resume().step == 1
    assert "step_00000003 IS DAMAGED and is passed over" in caplog.text
    assert made.max_difference() == 0.0
    made.save(Progress(step=2))  # and it goes on from there
    assert Checkpointer(tmp_path, model(2)).resume().step == 2


class Member:
    """Free-form user state."""

    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


def test_free_form_state_comes_back_as_it_was(tmp_path):
    state = {
        "counts": {1: "a", None: (2, 2**80), "nested": [{"t": torch.arange(4, dtype=torch.int16)}]},
        "shadow": {"w": torch.randn(3, 2), "scalar": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 2)},
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "inf": float("inf"),
    }
    Checkpointer(tmp_path, model(0), user=Member(state)).save(Progress(step=1))
    other = Member({"shadow": {"w": torch.zeros(9)}})
    Checkpointer(tmp_path, model(1), user=other).resume()
    assert repr(other.state) == repr(state)
    assert other.state["shadow"]["w"] is not state["shadow"]["w"]
    assert other.state["array"].dtype == np.float32
    with pytest.raises(IncompatibleCheckpoint, match="user"):
        Checkpointer(tmp_path, model(1)).resume()
    Checkpointer(tmp_path, model(1)).resume(allow_unexpected=["user"])
    with pytest.raises(UsageError, match="cannot be called 'optim'"):
        Checkpointer(tmp_path, optim=model(0))


def test_a_grad_scaler_is_a_member_like_any_other(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=3)
    made, optimizer = model(0), torch.optim.SGD(model(0).parameters(), lr=0.1)
    for value in (1.0, float("inf"), 1.0):
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        scaler.scale(made(torch.full((1, 7), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    Checkpointer(tmp_path, made, scaler=scaler).save(Progress(step=1))
    other = torch.amp.GradScaler("cpu")
    Checkpointer(tmp_path, model(1), scaler=other).resume()
    assert other.state_dict() == scaler.state_dict()
    assert scaler.get_scale() == 2.0**8, "a step was skipped"


def test_the_trackers_run_id_is_kept(tmp_path):
    Checkpointer(tmp_path, model(0)).save(Progress(step=1, wandb_run_id="abc123"))
    assert Checkpointer(tmp_path, model(1)).resume().wandb_run_id == "abc123"
    assert json.loads((tmp_path / "run.json").read_text())["wandb_run_id"] == "abc123"


def test_best_is_right_where_a_kill_came_before_its_pointer_moved(tmp_path):
    checkpointer, progress = Checkpointer(tmp_path, model(0), monitor="val"), Progress()
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.6)):
        progress.step = step
        checkpointer.save(progress, metrics={"val": value})
    (tmp_path / "best").write_text("step_00000001\n")
    assert Checkpointer(tmp_path, model(1), monitor="val").resume("best").step == 2
