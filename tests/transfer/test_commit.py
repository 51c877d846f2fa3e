"""The order that makes a visible step a complete one: files, folder, rename, run folder, pointer, run folder. And the run's file."""

import json
import os
import re

import pytest
import torch

from engine import Progress
from engine.catalog import settle
from engine.errors import StorageError
from engine.storage import LocalStorage
from engine.transfer.commit import commit_attempt
from engine.transfer.runfile import in_json, read_run_file, write_run_file
from tests.catalog.made import manifest, summary
from tests.catalog.saves import begin, hidden, in_view
from tests.kill import dying, refuse
from tests.now import Checkpointer


def test_everything_is_durable_before_it_is_visible_and_the_pointer_moves_last(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 2))
    checkpointer.save(Progress(step=1))  # makes the run folder and run.json
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: str) -> str:
        path = os.path.relpath(path, tmp_path)
        return re.sub(r"[0-9a-f]{12}", "*", path).replace(".lease_00000001/step_00000002.0002", "attempt").replace(".lease_00000001", "lease")

    def logged_fsync(fd: int) -> None:
        events.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def logged(real, verb: str):
        def call(source: str, target: str, **folders: int) -> None:
            events.append(f"{verb} {target}")
            real(source, target, **folders)

        return call

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged(rename, "rename to"))
    monkeypatch.setattr(os, "replace", logged(replace, "replace"))
    checkpointer.save(Progress(step=2))
    assert events == [
        "sync lease",  # the attempt's folder is made
        "sync attempt/rank_00000.0.safetensors",
        "sync attempt/rank_00000.index",
        "sync attempt",  # by every rank, before it reports
        "sync attempt/manifest",
        "sync attempt",
        "rename to step_00000002",
        "sync .",
        "sync lease/latest.*",
        "replace latest",
        "sync .",
    ]


def test_an_attempt_that_is_given_up_leaves_nothing(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    attempt = begin(storage, 30)
    for _ in range(2):
        assert not settle(storage, attempt)
        assert not hidden(storage)
        assert not in_view(storage)


def test_a_pointer_that_cannot_be_moved_is_told_with_the_step_that_is_committed(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    attempt = begin(storage, 30)
    refuse(monkeypatch, "replace")
    with pytest.raises(StorageError, match=r"step_00000030 is committed, but 'latest' could not be moved to it: .*Resume with step:30"):
        commit_attempt(storage, attempt, manifest(summary(30)))
    assert (tmp_path / "step_00000030").is_dir()


def test_the_run_file_says_what_the_run_is(tmp_path):
    storage = LocalStorage(tmp_path / "run_007")
    storage.make_folder("")
    write_run_file(storage, in_json({"experiment_name": "diffit_base", "lr": 1e-5, "nested": {(1, 2): {3: object}}}), "", "w1")
    told = json.loads((tmp_path / "run_007/run.json").read_text())
    assert list(told) == ["run_number", "experiment_name", "created", "wandb_run_id", "config"], "what people look for comes first"
    assert (told["run_number"], told["experiment_name"], told["wandb_run_id"]) == (7, "diffit_base", "w1")
    assert told["config"]["lr"] == 1e-5
    assert told["config"]["nested"] == {"(1, 2)": {"3": "<class 'object'>"}}
    assert read_run_file(storage) == told


def test_the_run_file_says_nothing_that_is_not_known(tmp_path):
    write_run_file(LocalStorage(tmp_path), {}, "")
    assert list(json.loads((tmp_path / "run.json").read_text())) == ["created", "config"]


def test_the_run_file_is_written_once_but_for_the_trackers_id(tmp_path):
    storage = LocalStorage(tmp_path)
    write_run_file(storage, {"lr": 1}, "")
    first = read_run_file(storage)
    write_run_file(storage, {"lr": 2}, "")
    assert read_run_file(storage) == first
    for number in ("w1", "w2", ""):
        write_run_file(storage, {"lr": 3}, "", number)
    assert read_run_file(storage) == {**first, "wandb_run_id": "w2"}
    with dying(None) as death:
        write_run_file(storage, {"lr": 3}, "", "w2")
    assert not death.calls


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 100_000, '"text"'])
def test_a_run_file_that_is_not_ours_stays_as_it_is(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    write_run_file(LocalStorage(tmp_path), {"lr": 1}, "", "w1")
    assert (tmp_path / "run.json").read_text() == text
    assert read_run_file(LocalStorage(tmp_path)) == {}
