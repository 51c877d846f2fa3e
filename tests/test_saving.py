"""Saves behind training: what is saved is the state at the call, whatever comes after; and what goes wrong is told, and costs nothing
that was committed."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress, saving
from engine.errors import StorageError, UsageError
from engine.storage import LocalStorage
from engine.transfer import process
from engine.transfer.staging import Copies
from engine.transfer.verify import verify
from tests.now import Checkpointer as Synchronous


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    step(module, optimizer)
    return module, optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*module.state_dict().values(), *moments)]


def stored(run, number: int) -> list[torch.Tensor]:
    module, optimizer = made(99)
    Synchronous(run, (module, optimizer)).resume(f"step:{number}")
    return values(module, optimizer)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def faulty(monkeypatch, fault: str) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-m", "tests.faulty_writer", fault))


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    """Two saves in flight, a third that waits, and training that goes on all the while."""
    faulty(monkeypatch, "slow")
    pair = made(0)
    checkpointer, expected = Checkpointer(tmp_path, pair), {}
    for number in range(1, 6):
        checkpointer.save(Progress(step=number))
        assert len(checkpointer._saves._images) <= 2
        expected[number] = (values(*pair), torch.get_rng_state())
        step(*pair)
    checkpointer.close()
    for number, (state, rng) in expected.items():
        assert verify(LocalStorage(tmp_path), f"step_{number:08d}") == []
        assert same(stored(tmp_path, number), state), number
        assert torch.equal(torch.get_rng_state(), rng)


def test_a_save_that_must_wait_says_so(tmp_path, monkeypatch, caplog):
    faulty(monkeypatch, "slow")
    checkpointer = Checkpointer(tmp_path, made(0), max_in_flight=1)
    for number in (1, 2):
        checkpointer.save(Progress(step=number))
    checkpointer.close()
    assert "1 saves are still in flight: this one waits" in caplog.text


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("die", "was killed by signal 9.*the next save starts a new one"),
        ("raise", "the writer process failed:(.|\n)*Traceback(.|\n)*the disk is on fire"),
        ("full", "the disk is full; free space.*committed before are untouched"),
        ("hang", "gave no sign of life for 2 s and was killed"),
    ],
)
def test_a_writer_that_fails_is_told_at_the_next_call_and_replaced(tmp_path, monkeypatch, fault, told):
    faulty(monkeypatch, fault)
    pair = made(0)
    checkpointer = Checkpointer(tmp_path, pair, timeout_seconds=2)
    checkpointer.save(Progress(step=1))
    checkpointer.save(Progress(step=2))
    with pytest.raises(StorageError, match=told) as raised:
        checkpointer.wait()
    assert "The save of step 2 failed, behind training" in raised.value.__notes__[0]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    checkpointer.save(Progress(step=3))
    checkpointer.close()
    assert same(stored(tmp_path, 3), values(*pair))
    assert not (tmp_path / "step_00000002").exists()


def test_training_goes_on_where_that_is_configured(tmp_path, monkeypatch, caplog):
    faulty(monkeypatch, "full")
    checkpointer = Checkpointer(tmp_path, made(0), on_failure="warn")
    for number in (1, 2, 3):
        checkpointer.save(Progress(step=number))
    checkpointer.close()
    assert "THE SAVE OF STEP 2 FAILED; training goes on, as configured" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003"]


def test_a_copy_that_overlaps_is_over_before_the_optimizer_changes_anything(tmp_path, monkeypatch):
    """As on CUDA: here nothing is copied before it must be."""
    start = Copies.start

    class Late:
        def __init__(self, copies: Copies) -> None:
            self.copies: Copies | None = copies

        def before_change(self) -> None:
            if self.copies is not None:
                start(self.copies)
                self.copies = None

        def wait(self) -> None:
            deadline = time.monotonic() + 20
            while self.copies is not None and time.monotonic() < deadline:
                time.sleep(0.01)

    def late(copies: Copies) -> Late:
        return Late(copies)

    monkeypatch.setattr(Copies, "start", late)
    module, optimizer = pair = made(0)
    checkpointer, before = Checkpointer(tmp_path, pair), values(*pair)
    checkpointer.save(Progress(step=1))
    module[1].eval()  # a forward in training would change the statistics, which are never late
    module(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    checkpointer.close()
    assert same(stored(tmp_path, 1), before)


def test_state_that_does_not_fit_memory_is_streamed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(saving, "fits_memory", lambda size_bytes: False)
    pair = made(0)
    checkpointer = Checkpointer(tmp_path, pair)
    checkpointer.save(Progress(step=1))
    assert same(stored(tmp_path, 1), values(*pair)), "when save() returns"
    assert "training waits for them" in caplog.text
    checkpointer.close()


def test_a_plan_that_changes_while_saves_are_in_flight(tmp_path, monkeypatch):
    faulty(monkeypatch, "slow")
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(module.parameters())
    checkpointer, expected = Checkpointer(tmp_path, (module, optimizer)), []
    for number in (1, 2, 3):  # no state, then moments, then a tensor that has moved
        checkpointer.save(Progress(step=number))
        expected.append(module.weight.detach().clone())
        module(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        module.weight.data = module.weight.data.clone()
    checkpointer.close()
    for number, weight in enumerate(expected, 1):
        other = nn.Linear(8, 8)
        Synchronous(tmp_path, (other, torch.optim.AdamW(other.parameters()))).resume(f"step:{number}")
        assert torch.equal(other.weight, weight)


class Board:
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, number: int) -> None:
        self.seen[name] = value


class Tracker:
    def log(self, values: dict[str, float]) -> None:
        raise RuntimeError("no network")


def test_events_go_to_whoever_listens_and_a_failing_one_costs_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, "engine")
    events, board, pair = [], Board(), made(0)
    checkpointer = Checkpointer(tmp_path, pair, events=[events.append, Tracker(), board])
    checkpointer.save(Progress(step=7))
    step(*pair)
    step(*pair)
    checkpointer.close()
    (event,) = events
    assert event.step == 7
    assert event.blocked_seconds > 0
    assert event.staged_seconds <= event.written_seconds <= event.committed_seconds
    assert event.size_bytes == sum(path.stat().st_size for path in (tmp_path / "step_00000007").glob("rank_*"))
    assert board.seen["checkpoint/size_bytes"] == event.size_bytes
    assert board.seen["checkpoint/gb_per_second"] > 0
    assert "an event of the save of step 7 was not taken: RuntimeError('no network')" in caplog.text
    with pytest.raises(UsageError, match="events takes functions"):
        Checkpointer(tmp_path, pair, events=[3])


def test_long_saves_and_loads_say_how_far_they_are(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("engine.events.Ticker.EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "engine")
    checkpointer = Checkpointer(tmp_path, made(0))
    checkpointer.save(Progress(step=1))
    checkpointer.resume()
    checkpointer.close()
    assert "write step 1: 0.00 GB in 0 s so far" in caplog.text
    assert f"reading {tmp_path}/step_00000001: 0.00 GB in 0 s so far" in caplog.text


SCRIPT = """
    import os, sys, torch
    from engine import Checkpointer, Progress
    model = torch.nn.Linear(64, 64)
    checkpointer = Checkpointer(sys.argv[1], model)
    checkpointer.save(Progress(step=1))
    print(checkpointer._saves._process.pid, flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()
"""


def test_a_normal_end_of_the_interpreter_loses_no_save(tmp_path):
    subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)], check=True, timeout=60)
    assert verify(LocalStorage(tmp_path), "step_00000001") == []


def test_a_writer_ends_with_its_trainer(tmp_path):
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), "stay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    writer = int(trainer.stdout.readline())
    os.kill(writer, 0)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait(10)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{writer}") and "Z" not in _state(writer):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_nothing_is_left_open(tmp_path):
    Checkpointer(tmp_path / "first", made(0)).close()  # what is made once
    before = len(os.listdir("/proc/self/fd"))
    checkpointer = Checkpointer(tmp_path / "run", made(0))
    checkpointer.save(Progress(step=1))
    checkpointer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_orphan_cannot_commit(tmp_path):
    """Two jobs in one run's folder: the one that saved into it first has lost it."""
    orphan, later = Checkpointer(tmp_path, made(0)), Checkpointer(tmp_path, made(1))
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
