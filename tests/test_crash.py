"""A fault at every change that a writer process asks of the system, and processes killed at random: the old step or the new one is there,
whole, and saves go on."""

import multiprocessing as mp
import os
import shutil
import time

import pytest

from benchmarks import crash
from engine import Checkpointer, Progress
from engine.catalog import steps
from engine.errors import EngineError
from engine.storage import LocalStorage
from engine.transfer import process
from tests import faulty_writer, now, tiny
from tests.catalog.saves import hidden

OLD, NEW = 11, 22  # seeds
SAVES = {"a further step": 2, "the same step anew": 1}
WIDTH = 3


def save_over(run, step: int, command) -> str:
    """A job that goes on from what is there and saves; the error it gets, if any."""
    process.COMMAND = command
    model = tiny.make(OLD, WIDTH)
    checkpointer = Checkpointer(run, model, keep_last=1, timeout_seconds=20)
    try:
        checkpointer.resume()
    except EngineError as e:  # its writer has failed as it took the run
        return str(e)
    newer = tiny.make(NEW, WIDTH)
    model[0].load_state_dict(newer[0].state_dict())
    model[1].load_state_dict(newer[1].state_dict())
    error = ""
    try:
        checkpointer.save(Progress(step=step))
        checkpointer.wait()
    except EngineError as e:
        error = str(e)
    try:
        checkpointer.close()
    except EngineError as e:
        error = error or str(e)
    return error


def run_to_its_end(run, step, command) -> None:
    save_over(run, step, command)
    os._exit(0)


def settled(run) -> None:
    """Until nobody changes the run any more: a writer whose trainer was killed may end what it was told."""
    before, quiet = None, 0
    while quiet < 4:
        now_there = sorted((path, len(files)) for path, _, files in os.walk(run))
        quiet, before = (quiet + 1 if now_there == before else 0), now_there
        time.sleep(0.01)


def check(run, step, what) -> str:
    """Which of the two is there; and that the next job's save succeeds."""
    model = tiny.make(5, WIDTH)
    checkpointer = now.Checkpointer(run, model)
    found = checkpointer.resume(corrupt="error").step
    state = {seed: tiny.state(tiny.make(seed, WIDTH)) for seed in (OLD, NEW)}
    live = tiny.state(model)
    which = next((seed for seed in state if tiny.same(live, state[seed])), None)
    assert which is not None, f"{what}: latest is step {found}, and neither the old state nor the new"
    assert found == (step if which == NEW else 1), what
    for one in steps(LocalStorage(run)):
        now.Checkpointer(run, tiny.make(6, WIDTH), read_only=True).resume(f"step:{one.number}", corrupt="error")
    checkpointer.save(Progress(step=step + 1))
    assert not hidden(LocalStorage(run)), what
    return "new" if which == NEW else "old"


def prepared(tmp_path, name) -> str:
    run = str(tmp_path / "base")
    if not os.path.exists(run):
        now.Checkpointer(run, tiny.make(OLD, WIDTH)).save(Progress(step=1))
    shutil.copytree(run, tmp_path / name)
    return str(tmp_path / name)


def calls_of(tmp_path, step, monkeypatch) -> list[str]:
    path = tmp_path / "calls"
    monkeypatch.setenv("LOCKSTEP_CALLS", str(path))
    assert save_over(prepared(tmp_path, "counted"), step, faulty_writer.command("count", at=0)) == ""
    monkeypatch.delenv("LOCKSTEP_CALLS")
    return path.read_text().split()


@pytest.fixture(autouse=True)
def sound_command(monkeypatch):
    monkeypatch.setattr(process, "COMMAND", process.COMMAND)  # set back when a test ends


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("action", ["fail", "die"])
def test_a_fault_at_every_change_the_writer_makes(tmp_path, monkeypatch, name, action):
    step, found = SAVES[name], []
    calls = calls_of(tmp_path, step, monkeypatch)
    assert len(calls) > 15
    for at, call in enumerate(calls, 1):
        run = prepared(tmp_path, "run")
        error = save_over(run, step, faulty_writer.command(action, at=at))
        which = check(run, step, f"{action} at call {at}, {call}")
        assert error or which == "new", f"{action} at call {at}, {call}: reported as saved, and it is not there"
        found.append(which)
        shutil.rmtree(run)
    assert {"old", "new"} == set(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SAVES)
@pytest.mark.parametrize("action", ["orphan", "both"])
def test_the_trainer_is_killed_at_every_change_its_writer_makes(tmp_path, monkeypatch, name, action):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(crash.PRELOAD)
    step, found = SAVES[name], []
    calls = calls_of(tmp_path, step, monkeypatch)
    for at, call in enumerate(calls, 1):
        run = prepared(tmp_path, "run")
        trainer = context.Process(target=run_to_its_end, args=(run, step, faulty_writer.command(action, at=at)))
        trainer.start()
        trainer.join(30)
        assert trainer.exitcode in (0, -9), f"{action} at call {at}, {call}"  # 0: it had ended before
        settled(run)
        found.append(check(run, step, f"{action} at call {at}, {call}"))
        shutil.rmtree(run)
    assert {"old", "new"} == set(found)


@pytest.mark.timeout(120)
def test_ranks_and_writers_killed_at_random():
    found = crash.kills(25, seed=int(time.time()))
    assert len(found) == 25
    assert [one for one in found if one.error or one.lost] == []
