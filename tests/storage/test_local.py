"""LocalStorage: the contract, what hostile folders may hold, and how the medium's refusals are told."""

import errno
import os
import re
import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import CheckpointCorrupt, StorageError
from engine.storage import LocalStorage, local
from tests.storage.contract import StorageTests, put


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "run")


class TestLocalStorage(StorageTests):
    pass


@contextmanager
def file_size_limit(size_bytes):
    """The kernel refuses writes past this size, with EFBIG, as a full disk does with ENOSPC."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _links(storage):
    storage.make_folder("a")
    put(storage, "a/secret")
    os.symlink(storage.path("a/secret"), storage.path("a/x"))


def _fifo(storage):
    storage.make_folder("a")
    os.mkfifo(storage.path("a/x"))


def _folder(storage):
    storage.make_folder("a/x")


def _dangling(storage):
    storage.make_folder("a")
    os.symlink("nowhere", storage.path("a/x"))


@pytest.mark.parametrize("make", [_links, _fifo, _folder, _dangling])
def test_only_regular_files_are_opened(storage, make):
    make(storage)
    for act in (storage.open, lambda p: storage.read(p, 100)):
        with pytest.raises(CheckpointCorrupt, match=r"a/x is (a symbolic link|not a regular file)"):
            act("a/x")


def test_a_root_below_a_regular_file_is_a_storage_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    storage = LocalStorage(tmp_path / "file" / "run")
    acts = [
        lambda: storage.make_folder("a"),
        lambda: storage.create("a"),
        lambda: storage.open("a"),
        lambda: storage.names(""),
        lambda: storage.point("a", "b", "c"),
    ]
    for act in acts:
        with pytest.raises(StorageError, match=r"file/run.*a part of that path is a file"):
            act()


def test_a_write_past_the_limit_is_a_storage_error_that_says_so(storage):
    storage.make_folder("a")
    with file_size_limit(10_000):
        writer = storage.create("a/x")
        with pytest.raises(StorageError, match=r"cannot write .*a/x: File too large .* Checkpoints committed before are untouched"):
            writer.write(memoryview(bytes(20_000)))
        writer.abandon()
        with pytest.raises(StorageError, match=r"cannot write .*latest"):
            storage.point("latest", "x" * 20_000, "a")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "system log"),
    ],
)
def test_each_refusal_of_the_medium_has_its_remedy(storage, monkeypatch, code, remedy):
    storage.make_folder("a")
    writer = storage.create("a/x")

    def refuse(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"cannot sync .*a/x: .*{remedy}"):
        writer.close()
    with pytest.raises(StorageError, match=remedy):
        storage.sync_folder("a")


def test_a_failed_sync_leaves_no_descriptor_open(storage, monkeypatch):
    storage.make_folder("a")
    writer = storage.create("a/x")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(StorageError):
        writer.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_refused_files_leave_no_descriptor_open(storage):
    _fifo(storage)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(CheckpointCorrupt):
            storage.open("a/x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_close_returns_after_the_file_is_synced(storage, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    root = storage.root
    storage.make_folder("a/b")
    assert {os.path.dirname(root), root, f"{root}/a"} <= set(synced), "each new folder's entry is synced in its parent"
    synced.clear()
    put(storage, "a/x")
    storage.publish("a", "c")
    storage.point("latest", "c\n", "c")
    assert [re.sub(r"[0-9a-f]{12}", "*", path) for path in synced] == [f"{root}/a/x", root, f"{root}/c/latest.*", root]
    synced.clear()
    storage.rename("c", ".c.removed")
    storage.claim_folder("d")
    assert synced == [root, root]


def test_where_names_cannot_be_exchanged_a_folder_is_replaced_in_two_steps(storage, monkeypatch):
    monkeypatch.setattr(local, "_exchange", lambda *_: False)
    StorageTests().test_publish_replaces_a_folder_leaving_nothing_of_it(storage)


def test_what_was_replaced_in_two_steps_is_never_half_under_a_name_that_says_it_is_whole(storage, monkeypatch):
    """It is given another before any of it is removed: a sweep takes what is called ``.replaced`` for a step."""
    storage.make_folder("step")
    put(storage, "step/x", b"old")
    storage.make_folder(".step.1")
    monkeypatch.setattr(local, "_exchange", lambda *_: False)
    removed = []
    monkeypatch.setattr(local.shutil, "rmtree", lambda path, **_: removed.append(os.path.basename(path)))
    storage.publish(".step.1", "step")
    assert removed == [".step.1.removed"]
    assert sorted(storage.names("")) == [".step.1.removed", "step"]


def test_what_cannot_be_removed_after_a_replacement_fails_no_save(storage, monkeypatch):
    for folder in ("step", ".step.1"):
        storage.make_folder(folder)
    monkeypatch.setattr(local, "_exchange", lambda *_: False)
    real = os.rename

    def refuse(source, target, **folders):
        if source.endswith(".replaced"):
            raise OSError(errno.EACCES, "refused")
        real(source, target, **folders)

    monkeypatch.setattr(os, "rename", refuse)
    storage.publish(".step.1", "step")
    assert sorted(storage.names("")) == [".step.1.replaced", "step"]


def test_a_replacement_that_fails_leaves_the_old_folder(storage, monkeypatch):
    storage.make_folder("step")
    put(storage, "step/x", b"old")
    storage.make_folder(".step.1")
    monkeypatch.setattr(local, "_exchange", lambda *_: False)
    real = os.rename

    def refuse(source, target, **folders):
        if source.endswith(".step.1"):
            raise OSError(errno.EIO, "broken")
        real(source, target, **folders)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match=r"cannot rename .*\.step\.1"):
        storage.publish(".step.1", "step")
    assert storage.read("step/x", 10) == b"old"


def test_while_a_folder_is_replaced_there_is_always_one(storage):
    """A reader that looks all the time sees the old or the new, never none and never a mixture."""
    seen, stop = set(), threading.Event()

    def attempt(text):
        storage.make_folder(f".step.{text}")
        for name in ("x", "y"):
            put(storage, f".step.{text}/{name}", text.encode())
        storage.publish(f".step.{text}", "step")

    def look():
        while not stop.is_set():
            try:
                fd = os.open(storage.path("step"), os.O_RDONLY)
            except FileNotFoundError:
                seen.add("none")
                continue
            try:
                seen.add("".join(Path(f"/proc/self/fd/{fd}/{name}").read_text()[:1] for name in "xy"))
            except FileNotFoundError:
                pass  # the old one, removed after it was opened
            finally:
                os.close(fd)

    attempt("a")
    watcher = threading.Thread(target=look)
    watcher.start()
    for i in range(60):
        attempt("ba"[i % 2])
    stop.set()
    watcher.join()
    assert seen <= {"aa", "bb"}, seen
    assert seen == {"aa", "bb"}


def test_a_relative_root_is_fixed_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("runs/a")
    monkeypatch.chdir("/")
    assert storage.root == str(tmp_path / "runs/a")


def test_a_link_in_the_place_of_a_folder_is_not_written_through(storage, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    storage.make_folder("a")
    os.symlink(outside, storage.path("a/b"))
    acts = [
        lambda: storage.create("a/b/x"),
        lambda: storage.claim_folder("a/b/c"),
        lambda: storage.make_folder("a/b/c"),
        lambda: storage.point("latest", "text", "a/b"),
        lambda: storage.remove("a/b/x"),
    ]
    for act in acts:
        with pytest.raises(StorageError, match="a link"):
            act()
    assert list(outside.iterdir()) == []
    assert storage.names("") == ["a"]


def test_inodes_that_are_used_up_are_not_called_a_full_disk(storage, monkeypatch):
    storage.make_folder("a")
    found = os.statvfs(storage.root)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*found[:7], 0, *found[8:10]]))
    monkeypatch.setattr(os, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(StorageError, match="no inodes are left, though there may be room"):
        storage.claim_folder("a/b")
