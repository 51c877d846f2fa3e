"""Which step a name means, and what is said where it means none."""

import logging
import os

import pytest

from engine.catalog import Step, find, steps
from engine.catalog.resolve import read_manifest
from engine.errors import CheckpointCorrupt, CheckpointNotFound, StorageError, UsageError
from engine.format.manifest import Manifest, encode
from engine.format.names import step_name
from engine.storage import LocalStorage


def commit(run, step: int, epoch: int = 0) -> None:
    folder = run / step_name(step)
    folder.mkdir(parents=True)
    manifest = Manifest(
        format=0,
        engine="single",
        world_size=1,
        epoch=epoch,
        step=step,
        samples=0,
        created=0.0,
        attempt="",
        parent="",
        metrics={},
        tensors=(),
        aliases={},
        indexes=(),
        record=b"",
    )
    (folder / "manifest").write_bytes(encode(manifest))


@pytest.fixture
def run(tmp_path):
    """Steps 5, 50 and 500 of epochs 1, 1 and 2; ``latest`` names 50."""
    for step, epoch in ((5, 1), (500, 2), (50, 1)):
        commit(tmp_path / "run", step, epoch)
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


@pytest.mark.parametrize("spoil", [_missing, _dangling, _binary, _huge, _empty, _escaping, _link, _folder])
def test_without_a_sound_pointer_latest_is_the_highest_step_with_a_warning(run, caplog, spoil):
    spoil(run / "latest")
    assert find(run, "latest")[1] == "step_00000500"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "taking step_00000500, the highest step" in record.getMessage()
    if spoil is _dangling:
        assert "'step_00000777', which is gone" in record.getMessage()


def test_by_step(run):
    assert find(run, "step:5")[1] == find(run, "step:00005")[1] == "step_00000005"


def test_by_epoch_is_its_last_step(run):
    assert find(run, "epoch:1")[1] == "step_00000050"
    assert find(run, "epoch:2")[1] == "step_00000500"


def test_by_epoch_passes_over_a_step_it_cannot_read(run, caplog):
    (run / "step_00000050" / "manifest").write_bytes(b"damaged")
    assert find(run, "epoch:1")[1] == "step_00000005"
    assert "step_00000050 is passed over" in caplog.text


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


@pytest.mark.parametrize("what", ["step:", "step:x", "epoch:-1", "epoch:1.5", "epoch", "step: 5"])
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


def test_a_manifest_that_is_missing_or_damaged_is_corrupt(run):
    storage = LocalStorage(run)
    assert read_manifest(storage, "step_00000050").step == 50
    (run / "step_00000050" / "manifest").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="step_00000050/manifest is truncated"):
        read_manifest(storage, "step_00000050")
    with pytest.raises(CheckpointCorrupt, match="step_00000051/manifest is missing"):
        read_manifest(storage, "step_00000051")
