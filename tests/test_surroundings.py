"""What is around a checkpointer: the working directory, file systems, the end of the process, forks, and objects that were not given."""

import errno
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress, events, numerics
from engine.errors import StorageError, UsageError
from engine.storage import local
from tests.now import Checkpointer as Now
from tests.tiny import make

SAVES = """
import torch
from engine import Checkpointer, Progress
model = torch.nn.Linear(4, 4)
ckpt = Checkpointer("run", (model, torch.optim.SGD(model.parameters(), lr=0.1)))
ckpt.save(Progress(step=1)); ckpt.close()
"""


@pytest.mark.parametrize("name", ["engine.py", "engine/__init__.py", "socket.py", "msgspec.py"])
def test_no_file_of_the_working_directory_runs_in_the_writer(tmp_path, name):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SAVES)
    file = tmp_path / "here" / name
    file.parent.mkdir(parents=True)
    file.write_text("open('it_ran', 'w')\n")
    done = subprocess.run([sys.executable, "../scripts/train.py"], cwd=tmp_path / "here", check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "run" / "step_00000001").is_dir()
    assert not (tmp_path / "here" / "it_ran").exists()


@pytest.fixture
def no_folder_sync(monkeypatch):
    """A file system that answers so where a folder is to be synced."""

    def set_up(code):
        real = os.fsync

        def fsync(fd):
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(code, os.strerror(code))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(local, "_reported_no_sync", False)

    return set_up


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_reported_once(tmp_path, no_folder_sync, caplog, code):
    no_folder_sync(code)
    checkpointer = Now(tmp_path / "run", make(), keep_last=1)
    for step in (1, 2):
        checkpointer.save(Progress(step=step))
    assert checkpointer.resume().step == 2
    assert caplog.text.count("cannot sync folders") == 1


def test_a_folder_whose_sync_fails_is_an_error(tmp_path, no_folder_sync):
    no_folder_sync(errno.EIO)
    with pytest.raises(StorageError, match="Input/output error"):
        Now(tmp_path / "run", make()).save(Progress(step=1))


@pytest.mark.parametrize(("code", "exit_code"), [("EIO", 1), ("", 0)])
def test_a_save_that_fails_as_the_process_ends_sets_its_exit_code(tmp_path, code, exit_code):
    """What the program has registered for the end is called all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import errno, os\ndef fsync(fd): raise OSError(errno.{code}, 'failing')\nos.fsync = fsync\n" if code else ""
    )
    script = (
        "import atexit, logging, os, sys, torch\n"
        "from engine import Checkpointer, Progress\n"
        "atexit.register(lambda: print('the last words'))\n"
        f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
        "m = torch.nn.Linear(8, 8)\n"
        f"Checkpointer({str(tmp_path / 'run')!r}, m).save(Progress(step=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (exit_code, "the last words\n"), done.stderr
    assert (tmp_path / "run" / "step_00000001").is_dir() == (not code)
    assert ("has failed, so the exit code is not 0" in done.stderr) == bool(code)


def test_a_forked_child_may_not_call_its_parents_checkpointer(tmp_path):
    checkpointer = Now(tmp_path, make())
    progress = Progress(step=1)
    child = os.fork()
    if not child:
        code = 0
        for call in (lambda: checkpointer.save(progress), checkpointer.wait, checkpointer.resume, checkpointer.prepare):
            try:
                call()
            except UsageError as e:
                code += "is a fork of the one that made the checkpointer" in str(e)
        checkpointer.close()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    checkpointer.save(progress)
    assert checkpointer.resume().step == 1


def test_what_looks_trained_and_was_not_given_is_reported_once(tmp_path, caplog):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(p.sum() for p in model.parameters()).backward()
    checkpointer = Now(tmp_path / "a", model)
    for step in (1, 2):
        checkpointer.save(Progress(step=step))
    assert caplog.text.count("was given without an optimizer, though it is trained") == 1
    caplog.clear()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpointer = Now(tmp_path / "b", (model, optimizer))
    checkpointer.save(Progress(step=1))
    assert "was given without a scheduler, though one drives its SGD" in caplog.text
    caplog.clear()
    Now(tmp_path / "c", (model, optimizer, scheduler)).save(Progress(step=1))
    Now(tmp_path / "d", nn.Linear(2, 2)).save(Progress(step=1))  # not trained: a teacher
    assert "was given without" not in caplog.text


def test_what_differs_numerically_is_reported_in_one_line(tmp_path, caplog):
    Now(tmp_path, make()).save(Progress(step=1))
    Now(tmp_path, make()).resume()
    assert "numerical environment" not in caplog.text
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_float32_matmul_precision("medium")
        Now(tmp_path, make()).resume()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    (message,) = (r.getMessage() for r in caplog.records if "numerical environment" in r.getMessage())
    assert f"float32_matmul_precision {precision} → medium; threads {threads} → {threads + 1}" in message


def test_the_numerical_environment_names_what_decides_last_bits():
    found = numerics.environment()
    assert {"torch", "processor", "threads", "float32_matmul_precision", "cudnn.benchmark", "deterministic_algorithms"} <= found.keys()
    assert found["torch"] == torch.__version__
    assert all(type(value) in (str, int, bool) for value in found.values())


def test_a_fresh_start_says_loudly_where_it_looked(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Checkpointer(tmp_path / "rnu", make(), max_in_flight=0).resume(missing="fresh") == Progress()
    assert f"STARTING FRESH: there is no checkpoint: the run folder {tmp_path}/rnu does not exist" in caplog.text


class Warmup:
    """As DeepSpeed's schedulers: it sets rates, and leaves no ``initial_lr`` in the groups."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.count = optimizer, -1
        self.step()

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state) -> None:
        self.count = state["count"]


def test_a_rate_that_a_scheduler_sets_is_not_reported_at_every_resume(tmp_path, caplog):
    def begin(scheduled=True, **options):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.5, "momentum": 0.9, **options})
        return model, optimizer, Warmup(optimizer) if scheduled else None

    model, optimizer, scheduler = begin()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    Now(tmp_path, (model, optimizer, scheduler)).save(Progress(step=3))
    member = begin()
    Now(tmp_path, member).resume()
    assert member[1].param_groups[0]["lr"] == 0.03
    assert " here and " not in caplog.text
    Now(tmp_path, begin(momentum=0.8)).resume()
    assert "momentum is 0.8 here and 0.9 in the checkpoint" in caplog.text
    Now(tmp_path, begin(scheduled=False)[:2]).resume()
    assert "lr is 0.5 here and 0.03 in the checkpoint" in caplog.text


def test_two_checkpointers_that_save_in_one_run_are_reported(tmp_path, caplog):
    message = f"a different Checkpointer of this process saves in {tmp_path}/run too"
    first, second, third = (Now(tmp_path / "run", make()) for _ in range(3))
    first.save(Progress(step=1))
    assert message not in caplog.text
    first.close()
    second.save(Progress(step=2))
    assert message not in caplog.text
    third.save(Progress(step=3))
    assert caplog.text.count(message) == 1
    Now(tmp_path / "other", make()).save(Progress(step=1))
    assert caplog.text.count("a different Checkpointer") == 1


def test_a_warning_that_comes_at_every_save_is_given_once_and_counted(caplog):
    for number in range(1, 101):
        events.warn_counted("a test's", "the disk is slow (%d)", number)
    assert [record.getMessage() for record in caplog.records if "slow" in record.getMessage()] == [
        "the disk is slow (1)",
        "the disk is slow (10) (10 times so far)",
        "the disk is slow (100) (100 times so far)",
    ]


def test_a_run_that_goes_back_says_what_it_leaves(tmp_path, caplog):
    first = Now(tmp_path, make())
    for step in (1, 2, 3):
        first.save(Progress(step=step))
    first.close()
    for keeps, left in ((True, ["step_00000002", "step_00000003", "step_00000004"]), (False, ["step_00000005"])):
        again = Now(tmp_path, make(), keep_last=1, keep_abandoned=keeps)
        again.resume("step:1" if keeps else "latest")
        again.save(Progress(step=4 if keeps else 5))
        again.close()
        assert sorted(path.name for path in tmp_path.glob("step_*")) == left
        assert ("2 steps of lines of training that were left stay" in caplog.text) == keeps
        caplog.clear()
