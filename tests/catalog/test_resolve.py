"""Which step a name means, and what is said where it means none."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from engine.catalog import Step, find, read_manifest, read_summary, steps
from engine.errors import CheckpointCorrupt, CheckpointNotFound, StorageError, UsageError
from engine.format.names import step_name
from engine.storage import LocalStorage
from tests.catalog.made import NAN, branch, commit, monitored, spoil


@pytest.fixture
def run(tmp_path):
    """Steps 5, 50 and 500 of epochs 1, 1 and 2; ``latest`` names 50."""
    for step, epoch in ((5, 1), (500, 2), (50, 1)):
        commit(tmp_path / "run", step, epoch=epoch)
    (tmp_path / "run" / "latest").write_text("step_00000050\n")
    return tmp_path / "run"


def test_steps_are_in_numeric_order(run):
    commit(run, 123_456_789)
    commit(run, 99_999_999)
    assert steps(LocalStorage(run)) == [Step(step_name(n), n) for n in (5, 50, 500, 99_999_999, 123_456_789)]


def test_only_committed_steps_are_listed(run):
    (run / ".step_00000600.ab12cd").mkdir()
    (run / ".step_00000600.ab12cd" / "manifest").write_bytes(b"torn")
    (run / "step_00000700").mkdir()  # no manifest
    for junk in ("step_8", "step_00000900.bak", "logs", "step_0000000x", "step_00000050 (copy)", "ステップ"):
        (run / junk).mkdir()
        (run / junk / "manifest").write_bytes(b"junk")
    (run / "step_00000800").write_text("a file")
    (run / "core.123").write_text("")
    assert [step.number for step in steps(LocalStorage(run))] == [5, 50, 500]


def test_latest_is_what_the_pointer_names_not_the_highest(run, caplog):
    storage, name = find(run, "latest")
    assert (storage.root, name) == (str(run), "step_00000050")
    assert not caplog.records


def _missing(pointer):
    pointer.unlink()


def _dangling(pointer):
    pointer.write_text("step_00000777\n")


def _binary(pointer):
    pointer.write_bytes(b"\xff\xfe\x00")


def _huge(pointer):
    pointer.write_text("x" * 10_000)


def _empty(pointer):
    pointer.write_text("")


def _escaping(pointer):
    pointer.write_text("../run/step_00000050")


def _link(pointer):
    pointer.unlink()
    os.symlink("step_00000050", pointer)


def _folder(pointer):
    pointer.unlink()
    pointer.mkdir()


@pytest.mark.parametrize("harm", [_missing, _dangling, _binary, _huge, _empty, _escaping, _link, _folder])
def test_without_a_sound_pointer_latest_is_the_step_saved_last_with_a_warning(run, caplog, harm):
    commit(run, 60, created=1000.0)
    harm(run / "latest")
    assert find(run, "latest")[1] == "step_00000060"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "taking step_00000060, the step saved last" in record.getMessage()
    if harm is _dangling:
        assert "'step_00000777', which is gone" in record.getMessage()


def test_by_step(run):
    assert find(run, "step:5")[1] == find(run, "step:00005")[1] == "step_00000005"


def test_by_epoch_is_its_last_step(run):
    (run / "latest").write_text("step_00000500\n")
    assert find(run, "epoch:1")[1] == "step_00000050"
    assert find(run, "epoch:2")[1] == "step_00000500"


def test_by_epoch_is_of_the_line_that_led_to_the_latest(run, caplog):
    """Resumed at 5, epoch 1 was done again, and ended at step 40."""
    commit(run, 40, branch(5), epoch=1)
    commit(run, 45, branch(5), epoch=3, latest=True)
    assert find(run, "epoch:1")[1] == "step_00000040"
    assert not caplog.records


def test_by_epoch_is_of_another_line_only_where_this_has_none(run, caplog):
    commit(run, 40, branch(5), epoch=3, latest=True)
    commit(run, 490, branch(7), epoch=2, created=1000.0)
    assert find(run, "epoch:2")[1] == "step_00000490", "the one saved last"
    assert "the line of training that led to step_00000040 has no checkpoint of 2 completed epochs; taking step_00000490" in caplog.text


def test_by_epoch_passes_over_a_step_it_cannot_read(run, caplog):
    spoil(run, 50)
    assert find(run, "epoch:1")[1] == "step_00000005"
    assert "step_00000050 is passed over" in caplog.text
    assert "taking that of step_00000500, the step saved last" in caplog.text


@pytest.fixture
def tuned(tmp_path):
    """Steps 10 to 40 of one line, 15 and 35 of another; by val_loss, 20 and 30 are the best of the line to 40."""
    for step, value in ((10, NAN), (20, 0.25), (30, 0.25), (40, 0.5)):
        commit(tmp_path, step, latest=True, **monitored(value))
    for step in (15, 35):
        commit(tmp_path, step, branch(10), **monitored(0.1))
    return tmp_path


def test_best_is_what_the_pointer_names(tuned, caplog):
    (tuned / "best").write_text("step_00000040\n")
    assert find(tuned, "best")[1] == "step_00000040"
    assert not caplog.records


@pytest.mark.parametrize("harm", [_missing, _dangling, _binary, _empty, _link, _folder])
def test_without_a_sound_pointer_best_is_found_anew_on_the_line_of_the_latest(tuned, caplog, harm):
    (tuned / "best").write_text("step_00000040\n")
    harm(tuned / "best")
    assert find(tuned, "best")[1] == "step_00000020", "the earlier of two equals"
    (record,) = caplog.records
    assert "taking step_00000020, the best there is (val_loss 0.25)" in record.getMessage()
    (tuned / "latest").write_text("step_00000035\n")
    assert find(tuned, "best")[1] == "step_00000015"


def test_best_is_the_largest_in_mode_max(tmp_path):
    for step, value in ((10, 0.1), (20, 0.9), (30, 0.5)):
        commit(tmp_path, step, latest=True, **monitored(value, "max"))
    assert find(tmp_path, "best")[1] == "step_00000020"


def test_best_goes_by_the_newest_monitor_that_the_line_has(tuned):
    commit(tuned, 50, latest=True, metrics={"val_loss": 0.01})
    assert find(tuned, "best")[1] == "step_00000050"


def test_best_where_nothing_was_monitored_says_what_to_do(run):
    with pytest.raises(CheckpointNotFound, match=r'no metric was monitored. Name one when saving \(monitor="val_loss"\)'):
        find(run, "best")


def test_best_where_every_value_is_nan_says_so(tmp_path):
    commit(tmp_path, 10, latest=True, **monitored(NAN))
    with pytest.raises(CheckpointNotFound, match=r"no step has a value of val_loss.*it has step_00000010"):
        find(tmp_path, "best")


def test_best_of_nothing_is_told_as_such(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no step has been committed there"):
        find(tmp_path, "best")


@pytest.mark.parametrize("what", ["latest", "epoch:1", "best"])
def test_where_no_manifest_can_be_read_that_is_no_absent_checkpoint(run, what):
    """A run that starts afresh without one must not do so here."""
    (run / "latest").unlink()
    for step in (5, 50, 500):
        spoil(run, step)
    with pytest.raises(CheckpointCorrupt, match="none has a manifest that can be read"):
        find(run, what)


def test_a_latest_step_that_cannot_be_read_is_still_the_latest(run):
    """Whoever opens it finds out, and falls back or not, as the caller wants."""
    spoil(run, 50)
    assert find(run, "latest")[1] == "step_00000050"


@pytest.mark.parametrize("name", ["step_8", "step_00000900.bak", "step_0000000x", "step_00000050 (copy)", "step_000000050", "step_"])
@pytest.mark.parametrize("what", ["latest", "epoch:1", "step:5", "PATH"])
def test_a_name_that_is_no_steps_is_refused_on_demand(run, name, what):
    place, what = (run, what) if what != "PATH" else (run / "elsewhere", str(run))
    find(place, what, names="refuse")
    shutil.copytree(run / "step_00000005", run / name)
    find(place, what)
    with pytest.raises(CheckpointCorrupt, match="is not how a step is named") as error:
        find(place, what, names="refuse")
    assert f"{run}/{name} " in str(error.value)


def test_a_step_without_a_manifest_is_refused_on_demand(run):
    (run / "step_00000700").mkdir()
    for other in (".step_8", "logs", "steps", ".step_00000600.0123456789ab"):
        (run / other).mkdir()
    find(run, "latest")
    with pytest.raises(CheckpointCorrupt, match=f"{run}/step_00000700 is no complete step: it has no file 'manifest'"):
        find(run, "latest", names="refuse")
    (run / "step_00000700").rmdir()
    assert find(run, "latest", names="refuse")[1] == "step_00000050"


def test_a_step_given_by_its_path_is_not_judged_by_its_neighbours(run):
    (run / "step_8").mkdir()
    assert find(run, str(run / "step_00000005"), names="refuse")[1] == "step_00000005"


def test_another_policy_for_names_is_an_error(run):
    with pytest.raises(UsageError, match="'tolerate'd or 'refuse'd"):
        find(run, "latest", names="ignore")  # type: ignore[arg-type]


def test_by_the_path_of_a_step(run, tmp_path, monkeypatch):
    for what in (str(run / "step_00000005"), f"{run}/step_00000005/", f"{run}/../run/step_00000005"):
        storage, name = find(tmp_path / "elsewhere", what)
        assert (storage.root, name) == (str(run), "step_00000005")
    monkeypatch.chdir(run)
    storage, name = find(tmp_path / "elsewhere", "step_00000005")
    assert (storage.root, name) == (str(run), "step_00000005")


def test_by_the_path_of_another_run(run, tmp_path):
    storage, name = find(tmp_path / "elsewhere", str(run))
    assert (storage.root, name) == (str(run), "step_00000050")


def test_a_copied_step_may_have_any_name(run, tmp_path):
    os.rename(run / "step_00000005", tmp_path / "golden")
    storage, name = find(tmp_path / "elsewhere", str(tmp_path / "golden"))
    assert (storage.root, name) == (str(tmp_path), "golden")


@pytest.mark.parametrize("what", ["step:", "step:x", "epoch:-1", "epoch:1.5", "epoch", "step: 5", "step:" + "9" * 5000])
def test_a_malformed_name_says_how_it_is_written(run, what):
    with pytest.raises(UsageError, match=r"after '(epoch|step):' comes a whole number, as in"):
        find(run, what)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("step:7", "there is no step 7"),
        ("epoch:9", "after 9 completed epochs"),
        ("/no/such/place", "there is no folder /no/such/place"),
        ("Latest", "there is no folder"),
    ],
)
def test_an_absent_checkpoint_says_what_there_is_instead(run, what, told):
    with pytest.raises(CheckpointNotFound, match=told) as error:
        find(run, what)
    assert "step_00000005, step_00000050, step_00000500. Name one of them" in str(error.value)


def test_a_long_list_of_steps_is_shortened(run):
    for step in range(1000, 1020):
        commit(run, step)
    with pytest.raises(CheckpointNotFound, match=r"it has step_00000005, step_00000050, …, step_00001017, step_00001018, step_00001019\."):
        find(run, "step:7")


def test_a_run_that_does_not_exist_is_told_with_the_working_directory(tmp_path):
    for what in ("latest", "step:3", "epoch:3"):
        with pytest.raises(CheckpointNotFound, match=f"the run folder {tmp_path}/none does not exist.*start at {os.getcwd()}"):
            find(tmp_path / "none", what)


def test_a_run_without_steps_is_told_as_such(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no step has been committed there"):
        find(tmp_path, "latest")


def test_a_folder_that_is_neither_is_told_as_such(run, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointNotFound, match="photos' is neither a step nor a run"):
        find(run, str(tmp_path / "photos"))


def test_a_file_where_a_run_should_be_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*a part of that path is a file"):
        find(tmp_path / "file", "latest")


@pytest.mark.parametrize("read", [read_summary, read_manifest])
def test_a_manifest_that_is_missing_or_damaged_is_corrupt(run, read):
    storage = LocalStorage(run)
    assert read_summary(storage, "step_00000050").step == read_manifest(storage, "step_00000050").summary.step == 50
    (run / "step_00000050" / "manifest").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="step_00000050/manifest is truncated"):
        read(storage, "step_00000050")
    with pytest.raises(CheckpointCorrupt, match="step_00000051/manifest is missing"):
        read(storage, "step_00000051")


@pytest.mark.parametrize("what", ["latest", "best", "epoch:1", "step:5"])
def test_steps_that_vanish_while_they_are_listed_break_nothing(run, monkeypatch, what):
    """A user deletes 500 between its listing and its reading."""
    real = LocalStorage.open

    def vanishing(storage, path):
        if path.startswith("step_00000500"):
            shutil.rmtree(Path(storage.root, "step_00000500"), ignore_errors=True)
        return real(storage, path)

    monkeypatch.setattr(LocalStorage, "open", vanishing)
    (run / "latest").unlink()
    if what == "best":
        with pytest.raises(CheckpointNotFound, match="no metric was monitored"):
            find(run, what)
    else:
        assert find(run, what)[1] == ("step_00000005" if what == "step:5" else "step_00000050")
