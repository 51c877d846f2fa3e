"""Numbered runs: who gets which number, and what a listing tells of each."""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from engine.catalog import find_run, new_run, runs
from engine.errors import CheckpointNotFound, StorageError, UsageError
from engine.format.names import parse_run, run_name
from engine.storage import LocalStorage
from engine.transfer.runfile import write_run_file
from tests.catalog.made import NAN, branch, commit, monitored, spoil
from tests.kill import refuse

JUNK = ["run_1", "run_0001", "run_x", "run_002_old", "run_", "RUN_009", "notes", "run_-01", "run_００９", " run_009"]


def test_runs_are_numbered_from_one(tmp_path):
    base = tmp_path / "checkpoints" / "base_training"
    assert [os.path.relpath(new_run(base), base) for _ in range(3)] == ["run_001", "run_002", "run_003"]
    assert [run.number for run in runs(base)] == [1, 2, 3]


def test_numbers_go_on_after_the_highest_whatever_was_deleted(tmp_path):
    for number in (2, 9, 999):
        (tmp_path / run_name(number)).mkdir()
    assert new_run(tmp_path) == str(tmp_path / "run_1000")
    shutil.rmtree(tmp_path / "run_009")
    assert new_run(tmp_path) == str(tmp_path / "run_1001")
    assert [run.number for run in runs(tmp_path)] == [2, 999, 1000, 1001]


def test_junk_counts_for_nothing(tmp_path):
    for name in JUNK:
        (tmp_path / name).mkdir()
    (tmp_path / "run_003").write_text("a file")
    assert runs(tmp_path) == []
    assert new_run(tmp_path) == str(tmp_path / "run_004")
    assert [run.number for run in runs(tmp_path)] == [4]


@pytest.mark.parametrize("number", [0, 7, 999, 1000, 123456])
def test_a_runs_name_is_read_back(number):
    assert parse_run(run_name(number)) == number


def test_no_two_processes_get_the_same_run(tmp_path):
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        made = list(pool.map(new_run, [tmp_path] * 24))
    assert sorted(made) == [str(tmp_path / run_name(number)) for number in range(1, 25)]


def test_a_run_that_another_process_takes_meanwhile_is_not_given_twice(tmp_path, monkeypatch):
    names = LocalStorage.names

    def slow(storage, folder):
        found = names(storage, folder)
        for number in (1, 2):
            os.makedirs(tmp_path / run_name(number), exist_ok=True)
        return found

    monkeypatch.setattr(LocalStorage, "names", slow)
    assert new_run(tmp_path) == str(tmp_path / "run_003")


def test_a_base_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    refuse(monkeypatch, "mkdir")
    with pytest.raises(StorageError, match=r"cannot create folder .*run_001: Permission denied"):
        new_run(tmp_path)


def test_a_listing_tells_experiment_start_checkpoints_and_best(tmp_path):
    run = tmp_path / "run_001"
    for step, value in ((10, 0.5), (20, 0.1234), (30, 0.4)):
        commit(run, step, latest=True, **monitored(value))
    write_run_file(LocalStorage(run), {"experiment_name": "diffit_base"}, "")
    told = find_run(tmp_path, 1)
    assert (told.path, told.experiment, told.steps, told.saves, told.monitor, told.best, told.best_step) == (
        str(run), "diffit_base", 3, 3, "val_loss", 0.1234, 20,
    )  # fmt: skip
    assert told.created is not None
    assert told.created > 1.7e9, "by run.json, not by its first step"


def progress(steps, best=None):
    """As a Checkpointer records it: every save that was given metrics, and the best of them."""
    return {"progress": {"epoch": 3, "history": [{"step": float(s), "epoch": 1.0, "val_loss": 0.5} for s in steps], "best": best, "stale": 0}}


def test_what_clean_up_deleted_still_counts(tmp_path):
    run = tmp_path / "run_001"
    record = progress([10, 20, 30, 40], {"value": 0.1, "step": 20, "epoch": 1})
    commit(run, 40, latest=True, record=record, **monitored(0.4))
    commit(run, 35, branch(30))
    told = find_run(tmp_path, 1)
    assert (told.steps, told.saves, told.best, told.best_step) == (2, 5, 0.1, 20)
    assert told.created == 35.0, "without a run.json, the first step that is left"


def test_a_run_without_checkpoints_or_monitor_says_so(tmp_path):
    new_run(tmp_path)
    commit(tmp_path / "run_002", 10)
    empty, plain = runs(tmp_path)
    assert (empty.steps, empty.saves, empty.best, empty.created, empty.experiment) == (0, 0, None, None, "")
    assert (plain.steps, plain.saves, plain.best, plain.monitor) == (1, 1, None, "")


def test_nan_is_no_best(tmp_path):
    commit(tmp_path / "run_001", 10, **monitored(NAN))
    assert find_run(tmp_path, 1).best is None


@pytest.mark.parametrize(
    "record",
    [
        None, {"progress": None}, {"progress": {"history": "x"}}, {"progress": {"history": [{"step": NAN}, {}]}}, {"progress": {"best": [1]}}, [], 5,
        {"progress": {"history": [{"step": float("inf")}]}}, {"progress": {"best": {"value": "low", "step": 10}}},
    ],
)  # fmt: skip
def test_a_record_that_is_not_a_training_runs_leaves_what_the_heads_say(tmp_path, record):
    commit(tmp_path / "run_001", 10, latest=True, record=record, **monitored(0.5))
    told = find_run(tmp_path, 1)
    assert (told.saves, told.best, told.best_step) == (1, 0.5, 10)


def test_damaged_runs_are_listed_all_the_same(tmp_path, monkeypatch):
    for number in (1, 2, 3, 4):
        commit(tmp_path / run_name(number), 10, latest=True, **monitored(0.5))
    spoil(tmp_path / "run_001", 10)
    (tmp_path / "run_002" / "latest").unlink()
    (tmp_path / "run_002" / "run.json").write_text('{"created": "yesterday", "experiment_name": 7}')
    (tmp_path / "run_003" / "run.json").write_text('{"created": 5')
    names = LocalStorage.names

    def refusing(storage, folder):
        if storage.root.endswith("run_004"):
            raise StorageError("not permitted")
        return names(storage, folder)

    monkeypatch.setattr(LocalStorage, "names", refusing)
    assert [(run.number, run.steps, run.best) for run in runs(tmp_path)] == [(1, 1, None), (2, 1, 0.5), (3, 1, 0.5), (4, 0, None)]


@pytest.mark.parametrize("when", [1, 2, 3, 4, 5])
def test_a_run_that_is_deleted_while_it_is_listed_breaks_nothing(tmp_path, monkeypatch, when):
    for number in (1, 2):
        commit(tmp_path / run_name(number), 10, latest=True, **monitored(0.5))
    write_run_file(LocalStorage(tmp_path / "run_001"), {}, "")
    real, reads = LocalStorage.open, []

    def vanishing(storage, path):
        reads.append(path)
        if len(reads) == when:
            shutil.rmtree(tmp_path / "run_001")
        return real(storage, path)

    monkeypatch.setattr(LocalStorage, "open", vanishing)
    assert [run.number for run in runs(tmp_path)] == [1, 2]


def test_a_run_is_found_by_its_number_or_as_the_latest(tmp_path):
    for number in (1, 3, 12):
        commit(tmp_path / run_name(number), 10)
    assert find_run(tmp_path, 3).path == str(tmp_path / "run_003")
    assert find_run(tmp_path, "latest").number == 12


def test_an_absent_run_says_which_there_are(tmp_path):
    with pytest.raises(CheckpointNotFound, match=f"there are no runs in {tmp_path}"):
        find_run(tmp_path, "latest")
    for _ in range(9):
        new_run(tmp_path)
    with pytest.raises(CheckpointNotFound, match=r"there is no run 77 in .*it has 1, 2, …, 5, 6, 7, 8, 9\."):
        find_run(tmp_path, 77)
    assert runs(tmp_path / "none") == []


@pytest.mark.parametrize("which", ["newest", "", "1", True, 1.0, None])
def test_what_names_no_run_is_refused(tmp_path, which):
    new_run(tmp_path)
    with pytest.raises(UsageError, match="names no run; give its number, or 'latest'"):
        find_run(tmp_path, which)
