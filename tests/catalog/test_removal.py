"""Deleting and sweeping, and that a kill at any instant of a save or a deletion shows nothing torn and loses nothing."""

import os
import shutil

import pytest

from engine.catalog import delete_step, restore, sweep
from engine.errors import StorageError, UsageError
from engine.storage import LocalStorage
from tests.catalog.made import everything, summary
from tests.catalog.saves import hidden, in_view, pointer, save
from tests.kill import dying, refuse

ATTEMPT = ".step_00000020.0123456789ab"
OTHER = ".step_00000020.ba9876543210"
NOT_OURS = [".step_20.0123456789ab", ".step_00000020.old", ".step_00000020.0123456789ab.bak", ".step_00000020", ".step_00000020.0123456789AB", "logs"]


@pytest.fixture
def storage(tmp_path):
    """Steps 10 and 20, saved as saves 1 and 2."""
    storage = LocalStorage(tmp_path / "run")
    with dying(None):
        save(storage, summary(10), 1)
        save(storage, summary(20), 2)
    return storage


def put_aside(storage, name=f"{ATTEMPT}.replaced", attempt=True):
    """As a kill between the two renames of a replacement leaves it: the old step aside, the new one still an attempt."""
    os.rename(storage.path("step_00000020"), storage.path(name))
    if attempt:
        shutil.copytree(storage.path("step_00000010"), storage.path(ATTEMPT))


def test_a_deleted_step_is_gone_and_the_rest_is_not(storage):
    delete_step(storage, "step_00000010")
    assert in_view(storage) == {20: 2}
    assert not hidden(storage)


def test_a_step_is_hidden_durably_before_any_of_it_is_removed(storage):
    with dying(None) as death:
        delete_step(storage, "step_00000010")
    assert death.calls[:2] == ["rename step_00000010", "fsync"]
    assert {call.split()[0] for call in death.calls[2:]} == {"unlink", "rmdir"}


def test_a_step_that_is_gone_already_is_no_error(storage):
    delete_step(storage, "step_00000099")
    delete_step(LocalStorage(storage.path("none")), "step_00000099")


@pytest.mark.parametrize("name", ["", ".", "..", "logs", "step_10", "step_00000010/manifest", "../run/step_00000010", ATTEMPT])
def test_only_steps_are_deleted(storage, name):
    with pytest.raises(UsageError, match="is no step's folder"):
        delete_step(storage, name)
    assert in_view(storage) == {10: 1, 20: 2}


def test_a_step_that_cannot_be_hidden_stays_whole(storage, monkeypatch):
    refuse(monkeypatch, "rename")
    with pytest.raises(StorageError, match=r"cannot rename .*step_00000010: Permission denied"):
        delete_step(storage, "step_00000010")
    assert in_view(storage) == {10: 1, 20: 2}


def test_what_cannot_be_removed_stays_hidden_until_it_can_be(storage, caplog):
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "unlink")
        delete_step(storage, "step_00000010")
        sweep(storage)
    assert in_view(storage) == {20: 2}
    (left,) = hidden(storage)
    assert left.endswith(".removed")
    assert caplog.text.count(f"{left} is left over and was not cleared up: cannot remove") == 2
    sweep(storage)
    assert not hidden(storage)


def test_a_sweep_removes_attempts_and_removed_steps(storage):
    for name in (ATTEMPT, OTHER, f"{ATTEMPT}.removed", ".step_00000010.0123456789ab"):
        shutil.copytree(storage.path("step_00000010"), storage.path(name))
    before = in_view(storage)
    sweep(storage)
    assert not hidden(storage)
    assert in_view(storage) == before
    assert pointer(storage) == "step_00000020"


def test_a_sweep_leaves_the_attempt_of_a_save_under_way(storage):
    put_aside(storage)
    before = everything(storage.root)
    sweep(storage, keep=ATTEMPT.rpartition(".")[2])
    restore(storage, keep=ATTEMPT.rpartition(".")[2])
    assert everything(storage.root) == before


def test_a_sweep_touches_nothing_that_is_not_ours(storage):
    for name in NOT_OURS:
        storage.make_folder(f"{name}/a")
    before = everything(storage.root)
    sweep(storage)
    assert everything(storage.root) == before


def test_a_file_under_a_name_of_ours_is_left_and_told(storage, caplog):
    for name in (ATTEMPT, f"{ATTEMPT}.removed"):
        open(storage.path(name), "w").close()
    os.symlink(storage.path("step_00000010"), storage.path(OTHER))
    sweep(storage)
    assert len(caplog.records) == 3
    assert in_view(storage) == {10: 1, 20: 2}


@pytest.mark.parametrize("clear_up", [sweep, restore])
@pytest.mark.parametrize("attempt", [True, False])
def test_a_step_that_is_aside_is_restored(storage, caplog, clear_up, attempt):
    put_aside(storage, attempt=attempt)
    clear_up(storage)
    assert in_view(storage) == {10: 1, 20: 2}
    assert hidden(storage) == ([ATTEMPT] if attempt and clear_up is restore else [])
    assert "step_00000020 is restored" in caplog.text


def test_restored_without_a_word_on_the_rest(storage):
    for name in (OTHER, f"{OTHER}.removed"):
        shutil.copytree(storage.path("step_00000010"), storage.path(name))
    before = everything(storage.root)
    restore(storage)
    assert everything(storage.root) == before


def test_of_two_that_are_aside_the_one_that_was_put_there_last_is_restored(storage):
    put_aside(storage, f"{OTHER}.replaced", attempt=False)
    with dying(None):
        save(storage, summary(20, created=30.0), 3)
    put_aside(storage, attempt=False)
    sweep(storage)
    assert in_view(storage) == {10: 1, 20: 3}
    assert not hidden(storage)


def test_the_one_whose_replacement_is_still_an_attempt_was_put_there_last(storage):
    """Clocks are not to be trusted."""
    put_aside(storage, f"{OTHER}.replaced", attempt=False)
    with dying(None):
        save(storage, summary(20, created=1.0), 3)
    put_aside(storage)
    sweep(storage)
    assert in_view(storage) == {10: 1, 20: 3}


def test_what_is_aside_without_a_manifest_is_no_step(storage):
    put_aside(storage)
    os.unlink(storage.path(f"{ATTEMPT}.replaced/manifest"))
    sweep(storage)
    assert in_view(storage) == {10: 1}
    assert not hidden(storage)


def test_what_is_aside_and_cannot_be_restored_stays(storage, caplog):
    put_aside(storage)
    storage.make_folder("step_00000020")
    sweep(storage)
    assert hidden(storage) == [f"{ATTEMPT}.replaced"]
    os.rmdir(storage.path("step_00000020"))
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "rename")
        sweep(storage)
    assert "is left over and was not cleared up: cannot rename" in caplog.text
    sweep(storage)
    assert in_view(storage) == {10: 1, 20: 2}


def test_a_deleted_step_does_not_come_back_as_what_it_had_replaced(storage):
    shutil.copytree(storage.path("step_00000020"), storage.path(f"{ATTEMPT}.replaced"))
    delete_step(storage, "step_00000020")
    sweep(storage)
    assert in_view(storage) == {10: 1}


def test_a_sweep_of_a_run_that_is_not_there_is_nothing(tmp_path):
    sweep(LocalStorage(tmp_path / "none"))
    assert os.listdir(tmp_path) == []


def test_what_a_user_removes_meanwhile_is_no_error(storage, monkeypatch, caplog):
    storage.make_folder(ATTEMPT)
    storage.make_folder(f"{OTHER}.replaced")
    names = LocalStorage.names

    def vanishing(self, path):
        found = names(self, path)
        for name in hidden_names(found):
            shutil.rmtree(self.path(name))
        return found

    def hidden_names(found):
        return [name for name in found if name.startswith(".step_")]

    monkeypatch.setattr(LocalStorage, "names", vanishing)
    sweep(storage)
    assert not caplog.records
    assert in_view(storage) == {10: 1, 20: 2}


# ------------------------------------------------------- killed at every instant


def kills(act, make, exchange=True):
    """What ``act`` leaves on a storage of ``make`` when it dies at its first change, its second, … and at last not at all."""
    for at in range(1, 100):
        storage = make(at)
        with dying(at, exchange) as death:
            act(storage)
        yield storage, death
        if not death.happened:
            return
    raise AssertionError("it never ends")


def makes(tmp_path, prepare=lambda storage: None):
    def make(at):
        storage = LocalStorage(tmp_path / f"run{at}")
        with dying(None):
            save(storage, summary(10), 1)
            save(storage, summary(20), 2)
            prepare(storage)
        return storage

    return make


def test_a_save_killed_at_any_instant_shows_all_of_it_or_nothing(tmp_path):
    seen = set()
    for storage, death in kills(lambda s: save(s, summary(30), 3), makes(tmp_path)):
        view, latest = in_view(storage), pointer(storage)
        assert view == {10: 1, 20: 2} | ({30: 3} if 30 in view else {})
        assert latest == "step_00000020" or 30 in view
        assert death.happened or latest == "step_00000030"
        seen.add((len(view), latest))
        sweep(storage)
        assert in_view(storage) == view
        assert not hidden(storage)
    assert seen == {(2, "step_00000020"), (3, "step_00000020"), (3, "step_00000030")}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_in_the_place_of_another_killed_at_any_instant_leaves_the_old_or_the_new(tmp_path, exchange):
    seen = set()
    for storage, death in kills(lambda s: save(s, summary(20, created=99.0), 3), makes(tmp_path), exchange):
        view = in_view(storage)
        seen.add(view.get(20))
        assert death.happened or (view[20] == 3 and not hidden(storage))
        restore(storage)
        sweep(storage)
        assert in_view(storage) == view | {10: 1, 20: view.get(20, 2)}
        assert not hidden(storage)
    assert seen == ({2, 3} if exchange else {2, None, 3})


def test_what_a_replacement_leaves_when_killed_never_comes_back_in_part(tmp_path):
    """A user deletes the new step, too, before anyone has swept."""
    for storage, _ in kills(lambda s: save(s, summary(20, created=99.0), 3), makes(tmp_path), exchange=False):
        shutil.rmtree(storage.path("step_00000020"), ignore_errors=True)
        sweep(storage)
        assert in_view(storage) in ({10: 1}, {10: 1, 20: 2})
        assert not hidden(storage)


def test_a_deletion_killed_at_any_instant_leaves_the_step_whole_or_hidden(tmp_path):
    seen = set()
    for storage, _ in kills(lambda s: delete_step(s, "step_00000020"), makes(tmp_path)):
        view = in_view(storage)
        seen.add(len(view))
        sweep(storage)
        assert in_view(storage) == view
        assert view == {10: 1} | ({20: 2} if 20 in view else {})
        assert not hidden(storage)
    assert seen == {1, 2}


def test_a_deletion_killed_at_any_instant_brings_no_older_step_back(tmp_path):
    def prepare(storage):
        shutil.copytree(storage.path("step_00000020"), storage.path(f"{ATTEMPT}.replaced"))
        save(storage, summary(20, created=99.0), 3)

    for storage, _ in kills(lambda s: delete_step(s, "step_00000020"), makes(tmp_path, prepare)):
        view = in_view(storage)
        assert view in ({10: 1, 20: 3}, {10: 1})
        sweep(storage)
        assert in_view(storage) == view


def test_a_sweep_killed_at_any_instant_can_be_taken_up_again(tmp_path):
    def prepare(storage):
        put_aside(storage)
        shutil.copytree(storage.path("step_00000010"), storage.path(f"{OTHER}.removed"))
        shutil.copytree(storage.path("step_00000010"), storage.path(".step_00000010.0123456789ab.replaced"))

    for storage, death in kills(sweep, makes(tmp_path, prepare)):
        assert in_view(storage) in ([{10: 1, 20: 2}] if not death.happened else [{10: 1, 20: 2}, {10: 1}])
        sweep(storage)
        assert in_view(storage) == {10: 1, 20: 2}
        assert not hidden(storage)
