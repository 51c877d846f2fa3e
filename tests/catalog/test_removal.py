"""Deleting and sweeping, and that a kill at any instant of a save or a deletion shows nothing torn and loses nothing."""

import os
import shutil
from pathlib import Path

import pytest

from engine.catalog import delete_step
from engine.catalog.lease import HOLDER, take
from engine.errors import StorageError, UsageError
from engine.storage import LocalStorage
from tests.catalog.made import everything, summary
from tests.catalog.saves import hidden, in_view, pointer, save
from tests.kill import dying, refuse

LEASE = ".lease_00000001"
ATTEMPT = f"{LEASE}/step_00000020.0003"
OTHER = f"{LEASE}/step_00000020.0004"
NOT_OURS = [".lease_1", ".lease_00000001.old", ".fenced_0123", ".step_00000020", "step_00000020.0003", "logs"]


@pytest.fixture
def storage(tmp_path):
    """Steps 10 and 20, saved as saves 1 and 2 of one job."""
    return made(tmp_path / "run")


def made(run):
    storage = LocalStorage(run)
    with dying(None):
        assert take(storage) == LEASE
        save(storage, summary(10), 1, LEASE)
        save(storage, summary(20), 2, LEASE)
    return storage


def put_aside(storage, name=f"{ATTEMPT}.replaced", attempt=True):
    """As a kill between the two renames of a replacement leaves it: the old step aside, the new one still an attempt."""
    os.rename(storage.path("step_00000020"), storage.path(name))
    if attempt:
        shutil.copytree(storage.path("step_00000010"), storage.path(ATTEMPT))


def test_a_deleted_step_is_gone_and_the_rest_is_not(storage):
    delete_step(storage, "step_00000010", LEASE)
    assert in_view(storage) == {20: 2}
    assert not hidden(storage)


def test_a_step_is_hidden_durably_before_any_of_it_is_removed(storage):
    with dying(None) as death:
        delete_step(storage, "step_00000010", LEASE)
    assert death.calls[:2] == ["rename step_00000010", "fsync"]
    assert {call.split()[0] for call in death.calls[2:]} == {"unlink", "rmdir"}


def test_a_step_that_is_gone_already_is_no_error(storage):
    delete_step(storage, "step_00000099", LEASE)
    delete_step(LocalStorage(storage.path("none")), "step_00000099", LEASE)


@pytest.mark.parametrize("name", ["", ".", "..", "logs", "step_10", "step_00000010/manifest", "../run/step_00000010", "step_00000020.0003"])
def test_only_steps_are_deleted(storage, name):
    with pytest.raises(UsageError, match="is no step's folder"):
        delete_step(storage, name, LEASE)
    assert in_view(storage) == {10: 1, 20: 2}


def test_a_step_that_cannot_be_hidden_stays_whole(storage, monkeypatch):
    refuse(monkeypatch, "rename")
    with pytest.raises(StorageError, match=r"cannot rename .*step_00000010: Permission denied"):
        delete_step(storage, "step_00000010", LEASE)
    assert in_view(storage) == {10: 1, 20: 2}


def test_what_cannot_be_removed_stays_hidden_until_it_can_be(storage, caplog):
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, "rmdir")
        delete_step(storage, "step_00000010", LEASE)
        take(storage)
    assert in_view(storage) == {20: 2}
    assert {left.rpartition(".")[2] for left in hidden(storage)} == {"removed"}
    assert "is left over and was not cleared up: cannot remove" in caplog.text
    take(storage)
    assert not hidden(storage)


def test_who_takes_a_run_removes_what_was_left_in_it(storage):
    for name in (ATTEMPT, OTHER, f"{ATTEMPT}.removed", f"{LEASE}/step_00000010.0123456789ab.removed"):
        shutil.copytree(storage.path("step_00000010"), storage.path(name))
    Path(storage.path(f"{LEASE}/latest.0123456789ab")).write_text("step_00000010")
    before = in_view(storage)
    assert take(storage) == ".lease_00000002"
    assert not hidden(storage)
    assert sorted(storage.names("")) == [".lease_00000002", "latest", "step_00000010", "step_00000020"]
    assert storage.names(".lease_00000002") == [HOLDER]
    assert in_view(storage) == before
    assert pointer(storage) == "step_00000020"


def test_nothing_is_touched_that_is_not_ours(storage):
    for name in NOT_OURS:
        storage.make_folder(f"{name}/a")
    before = set(everything(storage.root))
    take(storage)
    mine = {name for name in everything(storage.root) if name.startswith(".lease_0000")}
    assert before - {LEASE, f"{LEASE}/{HOLDER}"} == set(everything(storage.root)) - mine | {".lease_00000001.old", ".lease_00000001.old/a"}


def test_a_link_in_a_lease_is_removed_and_not_what_it_links_to(storage, caplog):
    Path(storage.path(ATTEMPT)).touch()
    os.symlink(storage.path("step_00000010"), storage.path(OTHER))
    os.symlink(storage.path("step_00000010"), storage.path(f"{LEASE}/notes"))
    take(storage)
    assert not hidden(storage)
    assert not caplog.records
    assert in_view(storage) == {10: 1, 20: 2}


@pytest.mark.parametrize("attempt", [True, False])
def test_a_step_that_is_aside_is_restored(storage, caplog, attempt):
    put_aside(storage, attempt=attempt)
    take(storage)
    assert in_view(storage) == {10: 1, 20: 2}
    assert not hidden(storage)
    assert "step_00000020 is restored" in caplog.text


def test_of_two_that_are_aside_the_one_that_was_put_there_last_is_restored(storage):
    put_aside(storage, f"{OTHER}.replaced", attempt=False)
    with dying(None):
        save(storage, summary(20, created=30.0), 3, LEASE)
    put_aside(storage, attempt=False)
    take(storage)
    assert in_view(storage) == {10: 1, 20: 3}
    assert not hidden(storage)


def test_the_one_whose_replacement_is_still_an_attempt_was_put_there_last(storage):
    """Clocks are not to be trusted."""
    put_aside(storage, f"{OTHER}.replaced", attempt=False)
    with dying(None):
        save(storage, summary(20, created=1.0), 3, LEASE)
    put_aside(storage)
    take(storage)
    assert in_view(storage) == {10: 1, 20: 3}


def test_what_is_aside_without_a_manifest_is_no_step(storage):
    put_aside(storage)
    os.unlink(storage.path(f"{ATTEMPT}.replaced/manifest"))
    take(storage)
    assert in_view(storage) == {10: 1}
    assert not hidden(storage)


def test_what_is_aside_and_cannot_be_restored_stays(storage, caplog):
    put_aside(storage)
    storage.make_folder("step_00000020")
    take(storage)
    (left,) = hidden(storage)
    assert left.endswith("/step_00000020.0003.replaced")
    take(storage)
    assert hidden(storage) == [left]
    os.rmdir(storage.path("step_00000020"))
    take(storage)
    assert in_view(storage) == {10: 1, 20: 2}


def test_a_deleted_step_does_not_come_back_as_what_it_had_replaced(storage):
    shutil.copytree(storage.path("step_00000020"), storage.path(f"{ATTEMPT}.replaced"))
    delete_step(storage, "step_00000020", LEASE)
    take(storage)
    assert in_view(storage) == {10: 1}


def test_what_a_user_removes_meanwhile_is_no_error(storage, monkeypatch, caplog):
    storage.make_folder(ATTEMPT)
    storage.make_folder(f"{OTHER}.replaced")
    names = LocalStorage.names

    def vanishing(self, path):
        found = names(self, path)
        for name in found if path.startswith(".fenced") else []:
            self.remove(f"{path}/{name}")
        return found

    monkeypatch.setattr(LocalStorage, "names", vanishing)
    take(storage)
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
        storage = made(tmp_path / f"run{at}")
        with dying(None):
            prepare(storage)
        return storage

    return make


def test_a_save_killed_at_any_instant_shows_all_of_it_or_nothing(tmp_path):
    seen = set()
    for storage, death in kills(lambda s: save(s, summary(30), 3, LEASE), makes(tmp_path)):
        view, latest = in_view(storage), pointer(storage)
        assert view == {10: 1, 20: 2} | ({30: 3} if 30 in view else {})
        assert latest == "step_00000020" or 30 in view
        assert death.happened or latest == "step_00000030"
        seen.add((len(view), latest))
        take(storage)
        assert in_view(storage) == view
        assert not hidden(storage)
    assert seen == {(2, "step_00000020"), (3, "step_00000020"), (3, "step_00000030")}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_in_the_place_of_another_killed_at_any_instant_leaves_the_old_or_the_new(tmp_path, exchange):
    seen = set()
    for storage, death in kills(lambda s: save(s, summary(20, created=99.0), 3, LEASE), makes(tmp_path), exchange):
        view = in_view(storage)
        seen.add(view.get(20))
        assert death.happened or (view[20] == 3 and not hidden(storage))
        take(storage)
        assert in_view(storage) == view | {10: 1, 20: view.get(20, 2)}
        assert not hidden(storage)
    assert seen == ({2, 3} if exchange else {2, None, 3})


def test_what_a_replacement_leaves_when_killed_never_comes_back_in_part(tmp_path):
    """A user deletes the new step, too, before anyone has swept."""
    for storage, _ in kills(lambda s: save(s, summary(20, created=99.0), 3, LEASE), makes(tmp_path), exchange=False):
        shutil.rmtree(storage.path("step_00000020"), ignore_errors=True)
        take(storage)
        assert in_view(storage) in ({10: 1}, {10: 1, 20: 2})
        assert not hidden(storage)


def test_a_deletion_killed_at_any_instant_leaves_the_step_whole_or_hidden(tmp_path):
    seen = set()
    for storage, _ in kills(lambda s: delete_step(s, "step_00000020", LEASE), makes(tmp_path)):
        view = in_view(storage)
        seen.add(len(view))
        take(storage)
        assert in_view(storage) == view
        assert view == {10: 1} | ({20: 2} if 20 in view else {})
        assert not hidden(storage)
    assert seen == {1, 2}


def test_a_deletion_killed_at_any_instant_brings_no_older_step_back(tmp_path):
    def prepare(storage):
        shutil.copytree(storage.path("step_00000020"), storage.path(f"{ATTEMPT}.replaced"))
        save(storage, summary(20, created=99.0), 3, LEASE)

    for storage, _ in kills(lambda s: delete_step(s, "step_00000020", LEASE), makes(tmp_path, prepare)):
        view = in_view(storage)
        assert view in ({10: 1, 20: 3}, {10: 1})
        take(storage)
        assert in_view(storage) == view


def test_a_run_whose_taking_is_killed_at_any_instant_can_be_taken(tmp_path):
    def prepare(storage):
        put_aside(storage)
        shutil.copytree(storage.path("step_00000010"), storage.path(f"{OTHER}.removed"))
        shutil.copytree(storage.path("step_00000010"), storage.path(f"{LEASE}/step_00000010.0001.replaced"))

    for storage, death in kills(take, makes(tmp_path, prepare)):
        assert in_view(storage) in ([{10: 1, 20: 2}] if not death.happened else [{10: 1, 20: 2}, {10: 1}])
        take(storage)
        assert in_view(storage) == {10: 1, 20: 2}
        assert not hidden(storage)
