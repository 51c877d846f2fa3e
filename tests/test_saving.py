"""Saves behind training, one process: what they hold, what becomes of their failures, and that nothing is left over."""

import copy
import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress, saving
from engine.catalog import steps
from engine.errors import StorageError
from engine.storage import LocalStorage
from engine.transfer import process
from engine.transfer.staging import Copies
from tests import faulty_writer, now, tiny


@pytest.fixture
def made():
    return tiny.make()


def change(model) -> None:
    """A training step and more: weights, moments, a buffer and random state are all others after it."""
    module, optimizer = model
    module(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        module[1].running_mean.add_(1.0)


def seen(model) -> list:
    return [*tiny.state(model), torch.get_rng_state().clone()]


def stored(run, what) -> list:
    """What a resume in a new job finds; random state of this process is as before."""
    model = tiny.make(seed=9)
    before = torch.get_rng_state()
    now.Checkpointer(run, model).resume(what, corrupt="error")
    found = seen(model)
    torch.set_rng_state(before)
    return found


def numbers(run) -> list[int]:
    return [step.number for step in steps(LocalStorage(run))]


def latest(run) -> str:
    return (Path(run) / "latest").read_text().strip()


def writer_of(checkpointer) -> process.WriterProcess:
    return checkpointer._saves._process


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_what_is_saved_is_the_state_at_the_call(tmp_path, made, monkeypatch, max_in_flight):
    faulty_writer.use(monkeypatch, "sleep", "create")
    checkpointer = Checkpointer(tmp_path, made, max_in_flight=max_in_flight)
    expected = []
    for step in range(1, 4):
        expected.append(seen(made))
        checkpointer.save(Progress(step=step))
        change(made)
    checkpointer.close()
    for step, state in enumerate(expected, 1):
        assert tiny.same(stored(tmp_path, f"step:{step}"), state), f"step {step} holds what came after it"
    assert not tiny.same(expected[0], expected[1])


def test_a_save_returns_before_its_files_are_written(tmp_path, made, monkeypatch):
    faulty_writer.use(monkeypatch, "sleep", "create")
    checkpointer = Checkpointer(tmp_path, made)
    for step in (1, 2):
        checkpointer.save(Progress(step=step))
    assert numbers(tmp_path) == []
    assert len(checkpointer._saves._flying) == 2
    checkpointer.wait()
    assert numbers(tmp_path) == [1, 2]
    assert latest(tmp_path) == "step_00000002"
    checkpointer.close()


def test_a_save_beyond_the_limit_waits_and_says_so(tmp_path, made, monkeypatch, caplog):
    faulty_writer.use(monkeypatch, "sleep", "create")
    with caplog.at_level(logging.WARNING, "engine"):
        checkpointer = Checkpointer(tmp_path, made, max_in_flight=2)
        for step in (1, 2):
            checkpointer.save(Progress(step=step))
        assert "still in flight" not in caplog.text
        checkpointer.save(Progress(step=3))
    assert "2 saves are still in flight: this one waits" in caplog.text
    assert len(checkpointer._saves._flying) == 2
    assert numbers(tmp_path) == [1], "it waits for the oldest only"
    checkpointer.save(Progress(step=4))
    assert len(checkpointer._saves._images) == 2
    checkpointer.close()
    assert numbers(tmp_path) == [1, 2, 3, 4]


def test_images_are_made_as_they_are_needed(tmp_path, made):
    checkpointer = Checkpointer(tmp_path, made, max_in_flight=3)
    for step in range(1, 6):
        checkpointer.save(Progress(step=step))
        checkpointer.wait()
    assert len(checkpointer._saves._images) == 1, "no two saves were in flight at once"
    checkpointer.close()


def test_what_a_first_save_does_once_is_done_before_it(tmp_path, made, monkeypatch):
    """By prepare(), and by a resume."""

    def refuse(*args):
        raise AssertionError("this should have been done before")

    for begin in (Checkpointer.prepare, Checkpointer.resume):
        checkpointer = Checkpointer(tmp_path, made)
        begin(checkpointer)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "Copies", refuse)
            patch.setattr(saving, "StagingImage", refuse)
            patch.setattr("engine.planning.make_plan", refuse)
            checkpointer.save(Progress(step=1))
        checkpointer.close()


class Late:
    """Copies that are made as late as they may be."""

    made = 0

    def __init__(self, copies: Copies, real) -> None:
        self._act = lambda: real(copies)

    def _once(self) -> None:
        act, self._act = self._act, lambda: None
        if act():
            Late.made += 1

    def before_change(self) -> None:
        self._once()

    def wait(self) -> None:
        time.sleep(0.05)  # training comes first
        self._once()


def test_copies_that_overlap_with_training_end_before_the_optimizers_step(tmp_path, made, monkeypatch):
    real = Copies.start
    monkeypatch.setattr(Copies, "start", lambda self: Late(self, real))
    module, optimizer = made
    Late.made, expected = 0, []
    checkpointer = Checkpointer(tmp_path, made)
    for step in range(1, 4):
        expected.append(tiny.state(made)[1])
        weights = module[0].weight.detach().clone()
        checkpointer.save(Progress(step=step))
        module(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(module[0].weight, weights)
        expected[-1] = (weights, expected[-1])
        checkpointer.wait()
    checkpointer.close()
    assert Late.made == 3
    for step, (weights, moments) in enumerate(expected, 1):
        found = stored(tmp_path, f"step:{step}")
        assert torch.equal(found[0]["0.weight"], weights)
        assert tiny.same(found[1], moments)


# ---------------------------------------------------------------- failures


def begun(run, made, monkeypatch, action, calls="write", at=1, **options):
    """A checkpointer with one sound step, whose writer process then is one with a fault, and the next ones are sound."""
    checkpointer = Checkpointer(run, made, **options)
    checkpointer.save(Progress(step=1))
    checkpointer.wait()
    writer_of(checkpointer).kill()
    faulty_writer.use(monkeypatch, action, calls, at)
    checkpointer._saves._running()
    monkeypatch.undo()
    return checkpointer


FAULTS = {
    "killed": ("die", "write", r"writer process \d+ was killed by signal 9"),
    "raised": ("raise", "write", r"(?s)the writer process failed:.*Traceback.*the disk is on fire"),
    "hangs": ("hang", "fsync", r"gave no sign of life for 1 s and was killed"),
    "disk full": ("full", "write", r"the disk is full"),
    "file size": ("limit", "write", r"file-size limit is reached"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("hears", ["wait", "save"])
def test_a_writers_failure_is_told_at_the_next_call_and_saves_go_on(tmp_path, monkeypatch, name, hears):
    action, calls, message = FAULTS[name]
    made = tiny.make(width=40)
    checkpointer = begun(tmp_path, made, monkeypatch, action, calls, timeout_seconds=1)
    pid, before = writer_of(checkpointer).pid, seen(made)
    change(made)
    checkpointer.save(Progress(step=2))
    heir = 1
    if hears == "save":  # which is saved all the same
        checkpointer._saves.wait_idle()
        heir = 3
        if name == "file size":
            writer_of(checkpointer).kill()
    with pytest.raises(StorageError, match=message) as raised:
        checkpointer.wait() if hears == "wait" else checkpointer.save(Progress(step=3))
    assert any("The save of step 2 failed, behind training" in note for note in raised.value.__notes__)
    checkpointer.wait()  # told once
    assert numbers(tmp_path) == sorted({1, heir})
    assert latest(tmp_path) == f"step_{heir:08d}"
    model = tiny.make(seed=9, width=40)
    now.Checkpointer(tmp_path / "elsewhere", model).resume(str(tmp_path / "step_00000001"))
    assert tiny.same(tiny.state(model), before[:2])
    if name == "file size" and hears == "wait":
        writer_of(checkpointer).kill()  # it is well, and its limit stays
    for step in (4, 5):
        checkpointer.save(Progress(step=step))
    checkpointer.wait()
    assert numbers(tmp_path) == sorted({1, heir, 4, 5})
    assert (writer_of(checkpointer).pid != pid) == (name in ("killed", "hangs", "file size"))
    checkpointer.close()
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".step")]


@pytest.mark.parametrize("order", [process.Write(0, "attempt", bytes(10_000_000), ""), process.Settle("attempt")], ids=["large", "small"])
def test_a_writer_that_reads_nothing_is_killed_after_the_timeout(tmp_path, monkeypatch, order):
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "import time; time.sleep(1000)"))
    writer = process.WriterProcess(process.Settings(str(tmp_path), 0, "holder", (None, None, None, True)), timeout_seconds=1)
    with pytest.raises(StorageError, match="gave no sign of life for 1 s and was killed"):
        writer.ask("write", order)
    assert not writer.is_alive


def test_both_saves_in_flight_fail_with_their_writer_or_go_on_with_a_new_one(tmp_path, made, monkeypatch):
    checkpointer = begun(tmp_path, made, monkeypatch, "die")
    for step in (2, 3):
        checkpointer.save(Progress(step=step))
    with pytest.raises(StorageError, match="signal 9"):
        checkpointer.wait()
    checkpointer.wait()
    assert numbers(tmp_path) == [1, 3]
    checkpointer.close()


def test_with_warn_a_failure_is_logged_and_training_goes_on(tmp_path, made, monkeypatch, caplog):
    checkpointer = begun(tmp_path, made, monkeypatch, "die", on_failure="warn")
    with caplog.at_level(logging.WARNING, "engine"):
        checkpointer.save(Progress(step=2))
        checkpointer.wait()
    assert "THE SAVE OF STEP 2 FAILED; training goes on, as configured" in caplog.text
    assert "killed by signal 9" in caplog.text
    checkpointer.save(Progress(step=3))
    checkpointer.close()
    assert numbers(tmp_path) == [1, 3]


# ---------------------------------------------------------------- ends

SCRIPT = """
import os, sys, time
import torch
from engine import Checkpointer, Progress
from engine.transfer import process
from tests import faulty_writer
process.COMMAND = faulty_writer.command("sleep", "create")
run, how = sys.argv[1:]
model = torch.nn.Linear(3, 3)
checkpointer = Checkpointer(run, model, timeout_seconds=20)
for step in (1, 2):
    checkpointer.save(Progress(step=step))
print(checkpointer._saves._process.pid, flush=True)
if how == "sleeps":
    time.sleep(60)
if how == "forks":
    child = os.fork()
    if child == 0:
        sys.exit(0)  # with what is registered for the end of an interpreter
    assert os.waitpid(child, 0)[1] == 0
if how == "raises":
    raise RuntimeError("training went wrong")
"""


def script(tmp_path, run, how) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, str(path), str(run), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def gone(pid: int, within_seconds: float) -> bool:
    """Whether a process that may be anybody's child has ended."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", ["ends", "raises", "forks"])
def test_an_end_of_the_interpreter_loses_no_save_in_flight(tmp_path, how):
    trainer = script(tmp_path, tmp_path / "run", how)
    out, err = trainer.communicate(timeout=60)
    assert trainer.returncode == (how == "raises"), err
    assert numbers(tmp_path / "run") == [1, 2]
    assert gone(int(out), 5)


def test_the_writer_ends_with_its_trainer_however_that_ends(tmp_path):
    trainer = script(tmp_path, tmp_path / "run", "sleeps")
    pid = int(trainer.stdout.readline())
    assert not gone(pid, 0.05)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate(timeout=10)
    assert gone(pid, 10)
    model = nn.Linear(3, 3)
    now.Checkpointer(tmp_path / "run", model).resume(missing="fresh")  # a new job finds a sound run, or none


def test_close_waits_and_leaves_no_descriptor_and_no_process(tmp_path, made):
    def descriptors():
        gc.collect()
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))

    def cycle(run):
        checkpointer = Checkpointer(run, made)
        for step in (1, 2):
            checkpointer.save(Progress(step=step))
        pid = writer_of(checkpointer).pid
        checkpointer.close()
        assert numbers(run) == [1, 2]
        assert gone(pid, 5)

    cycle(tmp_path / "warm")
    before = descriptors()
    for i in range(3):
        cycle(tmp_path / str(i))
    assert descriptors() == before


# ---------------------------------------------------------------- plans and memory


def test_an_image_that_does_not_fit_is_streamed_with_a_warning(tmp_path, made, monkeypatch, caplog):
    monkeypatch.setattr(saving, "fits_memory", lambda size_bytes: False)
    checkpointer = Checkpointer(tmp_path, made)
    with caplog.at_level(logging.WARNING, "engine"):
        for step in (1, 2):
            expected = seen(made)
            checkpointer.save(Progress(step=step))
            assert latest(tmp_path) == f"step_{step:08d}", "a streamed save is visible when it returns"
            change(made)
    assert caplog.text.count("does not fit the memory that is free") == 1
    assert not checkpointer._saves._images
    assert tiny.same(stored(tmp_path, "step:2"), expected)
    checkpointer.close()


def test_a_second_image_that_does_not_fit_makes_saves_wait(tmp_path, made, monkeypatch):
    answers = iter([True])
    monkeypatch.setattr(saving, "fits_memory", lambda size_bytes: next(answers, False))
    checkpointer = Checkpointer(tmp_path, made)
    expected = []
    for step in (1, 2, 3):
        expected.append(seen(made))
        checkpointer.save(Progress(step=step))
        change(made)
    assert len(checkpointer._saves._images) == 1
    checkpointer.close()
    assert all(tiny.same(stored(tmp_path, f"step:{step}"), state) for step, state in enumerate(expected, 1))


def test_a_plan_that_changes_between_saves_in_flight(tmp_path, monkeypatch):
    """State that appears with the first step, and a parameter that is trained from the second on."""
    faulty_writer.use(monkeypatch, "sleep", "create")

    def build(seed):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        module[0].weight.requires_grad_(False)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    model = build(0)
    checkpointer = Checkpointer(tmp_path, model)
    expected = []
    for step in range(1, 6):
        if step == 4:
            model[0][0].weight.requires_grad_(True)
        expected.append(copy.deepcopy(tiny.state(model)))
        checkpointer.save(Progress(step=step))
        change(model)
    checkpointer.close()
    assert [len(moments["state"]) for _, moments in expected] == [0, 5, 5, 5, 6]
    for step, state in enumerate(expected, 1):
        other = build(7)
        now.Checkpointer(tmp_path, other).resume(f"step:{step}")
        assert tiny.same(tiny.state(other), state), f"step {step}"


# ---------------------------------------------------------------- events


class Board:
    def __init__(self) -> None:
        self.got = {}

    def add_scalar(self, name, value, step) -> None:
        self.got.setdefault(step, {})[name] = value


class Run:
    """As a W&B run counts: a ``log`` that is committed is a step of its own."""

    def __init__(self) -> None:
        self.got, self.step = [], 0

    def log(self, values, commit=True) -> None:
        self.got.append(values)
        self.step += commit


def test_every_kind_of_sink_gets_the_figures_and_a_failing_one_costs_nothing(tmp_path, made, caplog):
    events, board, run = [], Board(), Run()

    def failing(event):
        raise RuntimeError("the tracker is down")

    with caplog.at_level(logging.INFO, "engine"):
        checkpointer = Checkpointer(tmp_path, made, events=[failing, events.append, board, run])
        for step in (1, 2):
            checkpointer.save(Progress(step=step))
            change(made)
            checkpointer.wait()
        checkpointer.close()
    assert [event.step for event in events] == sorted(board.got) == [1, 2]
    for event, logged in zip(events, run.got, strict=True):
        assert board.got[event.step] == event.scalars()
        assert logged == {"checkpoint/step": event.step, **event.scalars()}
        assert 0 < event.staged_seconds <= event.written_seconds <= event.committed_seconds
        assert 0 < event.blocked_seconds <= event.committed_seconds
        assert event.size_bytes > 0
        assert event.gb_per_second > 0
    assert run.step == 0, "the run's own count of steps is training's"
    assert caplog.text.count("the tracker is down") == 1
    assert "saved step 2" in caplog.text
    assert numbers(tmp_path) == [1, 2]


def test_steps_during_a_save_are_timed(tmp_path, made, monkeypatch):
    faulty_writer.use(monkeypatch, "sleep", "create")
    events = []
    checkpointer = Checkpointer(tmp_path, made, events=[events.append])
    checkpointer.save(Progress(step=1))
    for _ in range(4):
        change(made)
        time.sleep(0.01)
    checkpointer.close()
    assert events[0].steps == 4
    assert 0.01 <= events[0].step_p50_seconds <= events[0].step_max_seconds


def pair(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = torch.nn.Linear(8, 8)
    return module, torch.optim.AdamW(module.parameters())


def test_long_saves_and_loads_say_how_far_they_are(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("engine.events.Ticker.EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "engine")
    checkpointer = Checkpointer(tmp_path, pair(0))
    checkpointer.save(Progress(step=1))
    checkpointer.resume()
    checkpointer.close()
    assert "write step 1: 0.00 GB in 0 s so far" in caplog.text
    assert f"reading {tmp_path}/step_00000001: 0.00 GB in 0 s so far" in caplog.text


def test_an_orphan_cannot_commit(tmp_path):
    """Two jobs in one run's folder: the one that saved into it first has lost it."""
    orphan, later = Checkpointer(tmp_path, pair(0)), Checkpointer(tmp_path, pair(1))
    orphan.save(Progress(step=1))
    orphan.wait()
    later.save(Progress(step=2))
    later.wait()
    orphan.save(Progress(step=3))
    with pytest.raises(StorageError, match=r"belongs to another job now .*this one may no longer save into it"):
        orphan.wait()
    later.save(Progress(step=4))
    later.close()
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == ["step_00000001", "step_00000002", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
