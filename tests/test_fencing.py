"""Two jobs and one run, forks, files that have changed, writers that cannot be killed: whose steps count, and what is said."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress, catalog
from engine.catalog import Retention
from engine.catalog.lease import take
from engine.errors import StorageError, UsageError
from engine.storage import LocalStorage
from engine.transfer import process
from engine.transfer.verify import verify
from tests import now
from tests.catalog.made import LINE, summary
from tests.catalog.saves import save, uid_in


def model(value: float) -> nn.Linear:
    made = nn.Linear(2, 2)
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(value)
    return made


def saved(checkpointer, step: int) -> str:
    try:
        checkpointer.save(Progress(step=step))
        checkpointer.wait()
    except StorageError as e:
        return str(e)
    return "saved"


@pytest.mark.parametrize("max_in_flight", [0, 2])
def test_a_job_that_has_lost_its_run_stays_without_whatever_becomes_of_its_writer(tmp_path, max_in_flight):
    first = Checkpointer(tmp_path, model(1), max_in_flight=max_in_flight)
    assert saved(first, 10) == "saved"
    second = Checkpointer(tmp_path, model(2), max_in_flight=max_in_flight)
    second.resume()
    for _ in range(2):
        assert "belongs to another job now (host" in saved(first, 20)
        if max_in_flight:
            first._saves._process.kill()
    assert saved(second, 12) == "saved"
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("step")) == ["step_00000010", "step_00000012"]
    assert (tmp_path / "latest").read_text() == "step_00000012\n"


def test_a_job_that_only_reads_takes_nothing(tmp_path):
    first = now.Checkpointer(tmp_path, model(1))
    assert saved(first, 10) == "saved"
    reader = Checkpointer(tmp_path, made := model(0), read_only=True)
    assert reader.resume().step == 10
    assert made.weight[0, 0] == 1
    with pytest.raises(UsageError, match="read_only=True: it resumes, and leaves saving"):
        reader.save(Progress(step=11))
    assert saved(first, 11) == "saved"


def test_a_run_that_is_gone_or_a_copy_is_not_said_to_be_anothers(tmp_path):
    run = tmp_path / "run"
    checkpointer = now.Checkpointer(run, model(1))
    assert saved(checkpointer, 1) == "saved"
    run.rename(tmp_path / "moved")
    assert "is gone: it was moved or deleted while this job saves into it" in saved(checkpointer, 2)
    (tmp_path / "moved").rename(run)
    shutil.rmtree(run / ".lease_00000001")
    assert "this job's lease of the run, is gone, and no other job has taken the run" in saved(checkpointer, 3)


def test_a_token_is_above_those_of_a_copied_run(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    for _ in range(3):
        held = take(storage)
    save(storage, summary(10), 1, held)
    shutil.copytree(storage.path("step_00000010"), tmp_path / "copy" / "step_00000010")
    assert take(LocalStorage(tmp_path / "copy")) == ".lease_00000004"


def test_jobs_that_take_one_run_at_once_get_it_or_a_message(tmp_path):
    for _ in range(10):
        found, lost, start = [], [], threading.Barrier(4)

        def one(found=found, lost=lost, start=start):
            start.wait()
            try:
                found.append(take(LocalStorage(tmp_path)))
            except StorageError as e:
                lost.append(str(e))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found
        assert all("belongs to another job now" in text for text in lost)
        assert sorted(found)[-1] == max(name for name in os.listdir(tmp_path) if name.startswith(".lease"))


def test_a_fork_has_neither_socket_nor_images(tmp_path):
    checkpointer = Checkpointer(tmp_path, model(1))
    assert saved(checkpointer, 1) == "saved"
    writer = checkpointer._saves._process
    read, write = os.pipe()
    if not (child := os.fork()):
        maps = Path("/proc/self/maps").read_text().count("lockstep-image")
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
        os.write(write, f"{maps} {sum('lockstep-image' in link for link in links)}".encode())
        signal.pause()
    try:
        assert os.read(read, 100) == b"0 0"
        checkpointer.close()
        assert writer._process.returncode == 0, "it has ended by itself, though the child lives"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_writer_that_cannot_be_killed_is_left_and_said(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, model(1))
    assert saved(checkpointer, 1) == "saved"
    writer = checkpointer._saves._process
    writer._timeout_seconds = 2
    monkeypatch.setattr(process, "_END_SECONDS", 0.1)
    monkeypatch.setattr(writer._process, "kill", lambda: None)  # as one that waits for a dead device
    os.kill(writer.pid, signal.SIGSTOP)
    try:
        assert "gave no sign of life for 2 s" in saved(checkpointer, 2)
        assert "was killed and does not end: the storage hangs in the system" in saved(checkpointer, 3)
        checkpointer.close()
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer._process.wait()


def test_where_no_thread_can_be_started_training_waits_for_the_save(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path, model(1))
    real = threading.Thread.start

    def refuse(thread):
        if thread.name == "lockstep-saves":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    checkpointer.save(Progress(step=1))
    assert (tmp_path / "step_00000001").is_dir()
    assert "can't start new thread" in caplog.text
    checkpointer.close()


@pytest.fixture
def frozen(monkeypatch):
    """A way to a model of which a part is not trained, and stored in a file of its own."""
    monkeypatch.setattr("engine.plan.assign.FROZEN_BYTES", 1024)

    def make(value: float) -> nn.Module:
        made = nn.Sequential(nn.Linear(64, 64, bias=False).requires_grad_(False), nn.Linear(2, 2))
        with torch.no_grad():
            made[0].weight.fill_(value)
        return made

    return make


@pytest.mark.parametrize("damage", ["truncated", "replaced by a link", "written to"])
def test_a_linked_file_that_has_changed_is_not_passed_on(tmp_path, caplog, frozen, damage):
    checkpointer = now.Checkpointer(tmp_path / "run", frozen(1))
    assert saved(checkpointer, 1) == saved(checkpointer, 2) == "saved"
    (path,) = (tmp_path / "run/step_00000002").glob("frozen.*.safetensors")
    assert path.stat().st_nlink == 2
    if damage == "truncated":
        os.truncate(path, 10)
    elif damage == "written to":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.rename(tmp_path / "away")
        path.symlink_to(tmp_path / "away")
    assert saved(checkpointer, 3) == "saved"
    assert "HAS CHANGED since it was written: it is written again" in caplog.text
    assert verify(LocalStorage(tmp_path / "run"), "step_00000003") == []


def test_a_file_that_this_job_has_not_written_is_read_before_it_is_linked(tmp_path, caplog, frozen):
    assert saved(now.Checkpointer(tmp_path, frozen(1)), 1) == "saved"
    (path,) = (tmp_path / "step_00000001").glob("frozen.*.safetensors")
    stat, data = path.stat(), bytearray(path.read_bytes())
    checkpointer = now.Checkpointer(tmp_path, frozen(1))
    checkpointer.resume()
    data[-1] ^= 1  # as a disk may, which changes nothing else of the file
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert saved(checkpointer, 2) == "saved"
    assert "HAS CHANGED" in caplog.text
    assert verify(LocalStorage(tmp_path), "step_00000002") == []


def test_the_step_saved_last_is_known_though_the_clock_was_set_back(tmp_path):
    storage = LocalStorage(tmp_path)
    held = take(storage)
    save(storage, summary(2, created=100.0), 1, held)
    save(storage, summary(3, created=50.0), 2, held)
    os.unlink(storage.path("latest"))
    assert catalog.find(tmp_path, "latest")[1] == "step_00000003"


def test_the_calls_of_a_save_do_not_grow_with_the_steps_that_are_kept(tmp_path, monkeypatch):
    storage, counts = LocalStorage(tmp_path), []
    held = take(storage)
    tidying = catalog.Tidying(storage, Retention(2, 1))
    opened, real = [], LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", lambda self, path: opened.append(path) or real(self, path))
    for step in range(1, 120):
        opened.clear()
        tidying.after(save(storage, summary(step, LINE, best_step=1), step, held))
        counts.append(len(opened))
    assert counts[-1] == counts[5]
    assert len(catalog.steps(storage)) == 119


@pytest.mark.parametrize("state", ["attempt", "committed", "aside"])
def test_an_attempt_whose_commit_failed_is_settled(tmp_path, state):
    """As where the writer died before, after, or in the middle of its renames."""
    storage = LocalStorage(tmp_path)
    held = take(storage)
    save(storage, summary(10), 1, held)
    attempt = save(storage, summary(10), 2, held).attempt
    os.unlink(tmp_path / "latest")
    if state != "committed":
        shutil.copytree(tmp_path / "step_00000010", tmp_path / attempt)
        (tmp_path / "step_00000010").rename(tmp_path / f"{attempt}.replaced")
        save(storage, summary(10), 1, held) if state == "attempt" else None
    assert catalog.settle(storage, attempt) == (state != "attempt")
    assert uid_in(storage, "step_00000010") == (1 if state == "attempt" else 2)
    assert not (tmp_path / attempt).exists()
