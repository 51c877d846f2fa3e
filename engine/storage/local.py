"""Files of a POSIX file system, local or shared."""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import CheckpointCorrupt, StorageError
from engine.options import local_path
from engine.storage.base import REMOVED, REPLACED

logger = logging.getLogger("engine")

_NO_LINKS = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_reported_no_sync = False
_LARGE_BYTES = 1024 * 1024
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_REMEDY = {
    errno.ENOSPC: "the disk is full; free space or remove old steps. Checkpoints committed before are untouched",
    errno.EDQUOT: "the disk quota is used up; free space or remove old steps. Checkpoints committed before are untouched",
    errno.EFBIG: "the file-size limit is reached (ulimit -f). Checkpoints committed before are untouched",
    errno.EROFS: "the file system is read-only; give a run folder that can be written",
    errno.EACCES: "permission denied; give a run folder that this user can write",
    errno.ENOTDIR: "a part of that path is a file; give the path of a run folder",
    errno.EEXIST: "the name is taken; remove or rename what is there",
    errno.EPERM: "not permitted; give a run folder that this user can write",
}


@contextmanager
def _told(action: str, path: str) -> Iterator[None]:
    """Turn the medium's refusals into StorageError; an absent path stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as e:
        raise StorageError(f"cannot {action} {path}: {e.strerror or e} — {_REMEDY.get(e.errno or 0, 'see the system log')}") from e


class _LocalWriter:
    """A large file takes its room at once, so that a full disk is found before anything is written, and bypasses the page cache for as
    long as the data come in whole pages: copying them there takes processor time, which belongs to training."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._direct = getattr(os, "O_DIRECT", 0) if size_bytes >= _LARGE_BYTES else 0
        try:
            self._fd = os.open(path, flags | self._direct, 0o644)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = 0  # not on this file system, which has made the file all the same
            self._fd = os.open(path, flags & ~os.O_EXCL, 0o644)
        if size_bytes >= _LARGE_BYTES:
            try:
                _reserve(self._fd, size_bytes)
            except OSError:
                os.close(self._fd)
                raise

    def write(self, data: memoryview) -> None:
        with _told("write", self._path):
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except OSError as e:
                    if e.errno != errno.EINVAL or not self._direct:
                        raise
                    fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~self._direct)
                    self._direct = 0

    def close(self) -> None:
        with _told("sync", self._path):
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)

    def abandon(self) -> None:
        os.close(self._fd)


class _LocalReader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = _open_regular(path)
        self.size_bytes = os.fstat(self._fd).st_size

    def read_into(self, offset: int, target: memoryview) -> None:
        with _told("read", self._path):
            while target:
                count = os.preadv(self._fd, [target], offset)
                if count == 0:
                    raise CheckpointCorrupt(f"{self._path} is truncated: it ends at byte {offset}, {len(target)} more are expected")
                target, offset = target[count:], offset + count

    def close(self) -> None:
        os.close(self._fd)


def _reserve(fd: int, size_bytes: int) -> None:
    """Room on the disk. Not by os.posix_fallocate: where the file system cannot, that writes zeros."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def _open_regular(path: str) -> int:
    """A checkpoint may be hostile: no link is followed, no FIFO or device opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise CheckpointCorrupt(
                f"{path} is a symbolic link; a checkpoint holds regular files only. Where a cache has put links in their place, copy what they "
                "point to: cp -rL FROM TO"
            ) from e
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointCorrupt(f"{path} is not a regular file")
    return fd


class LocalStorage:
    """See :class:`engine.storage.base.Storage`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.abspath(local_path("the run's folder", os.fspath(root)))

    def path(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root

    def names(self, folder: str) -> list[str]:
        try:
            with _told("list", self.path(folder)):
                return os.listdir(self.path(folder))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.path(path))

    def read(self, path: str, limit_bytes: int) -> bytes:
        reader = self.open(path)
        try:
            if reader.size_bytes > limit_bytes:
                raise CheckpointCorrupt(f"{self.path(path)} has {reader.size_bytes} bytes, at most {limit_bytes} are expected")
            data = bytearray(reader.size_bytes)
            reader.read_into(0, memoryview(data))
            return bytes(data)
        finally:
            reader.close()

    def open(self, path: str) -> _LocalReader:
        with _told("open", self.path(path)):
            return _LocalReader(self.path(path))

    def create(self, path: str, size_bytes: int = 0) -> _LocalWriter:
        with _told("create", self.path(path)):
            return _LocalWriter(self.path(path), size_bytes)

    def link(self, path: str, name: str) -> bool:
        try:
            os.link(self.path(path), self.path(name), follow_symlinks=False)
        except OSError as e:
            if e.errno in _NO_LINKS:
                return False
            with _told("link", self.path(name)):
                raise
        return True

    def make_folder(self, path: str) -> None:
        missing, folder = [], self.path(path)
        while not os.path.isdir(folder) and folder != os.path.dirname(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        with _told("create folder", self.path(path)):
            os.makedirs(self.path(path), exist_ok=True)
            for made in missing:
                _sync(os.path.dirname(made))

    def claim_folder(self, path: str) -> bool:
        with _told("create folder", self.path(path)):
            try:
                os.mkdir(self.path(path))
            except FileExistsError:
                return False
            _sync(os.path.dirname(self.path(path)))
        return True

    def publish(self, hidden: str, visible: str) -> None:
        source, target = self.path(hidden), self.path(visible)
        with _told("rename", source):
            replaced = _replace(source, target) if os.path.lexists(target) else ""
            if not replaced:
                os.rename(source, target)
            _sync(os.path.dirname(target))
        if replaced:
            _discard(replaced)

    def rename(self, folder: str, name: str) -> None:
        source, target = self.path(folder), self.path(name)
        with _told("rename", source):
            if os.path.lexists(target):  # an empty folder would be replaced without a word
                raise FileExistsError(errno.EEXIST, f"{name} exists", source)
            os.rename(source, target)
            _sync(os.path.dirname(target))

    def point(self, path: str, text: str) -> None:
        temporary = f"{self.path(path)}.new"
        with _told("write", self.path(path)):
            with open(temporary, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path(path))
        self.sync_folder(os.path.dirname(path))

    def sync_folder(self, path: str) -> None:
        with _told("sync folder", self.path(path)):
            _sync(self.path(path))

    def remove_folder(self, path: str) -> None:
        with _told("remove", self.path(path)):
            shutil.rmtree(self.path(path))


def _sync(folder: str) -> None:
    """Sync a folder's names. Some file systems (CIFS, some of FUSE) have no such call, which is reported once."""
    global _reported_no_sync
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_SYNC:
            raise
        if not _reported_no_sync:
            _reported_no_sync = True
            logger.warning("the file system of %s cannot sync folders (%s): a step may be lost to a power failure soon after it", folder, e.strerror)
    finally:
        os.close(fd)


def _replace(source: str, target: str) -> str:
    """Put the folder ``source`` in the place of ``target``; returns where the old one now lies, hidden.

    In one step where the system can exchange two names (Linux, most local file systems), so that at no instant is there none.
    Elsewhere (NFS) in two: a kill between them leaves the old one under its hidden name.
    """
    if _exchange(source, target):
        return source
    aside = f"{source}{REPLACED}"
    os.rename(target, aside)  # under a name that says it is whole, and the step if there is no other: catalog.sweep restores it
    try:
        os.rename(source, target)
    except OSError:
        os.rename(aside, target)
        raise
    return aside


def _discard(replaced: str) -> None:
    """Remove what was replaced. Best effort: it is hidden, and swept later. One in part must not pass for a whole one."""
    try:
        if replaced.endswith(REPLACED):
            removed = replaced.removesuffix(REPLACED) + REMOVED
            os.rename(replaced, removed)
            _sync(os.path.dirname(removed))
            replaced = removed
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError:
        pass


def _exchange(a: str, b: str) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in every C library
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
