"""Files of a POSIX file system, local or shared."""

import contextlib
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
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_reported_no_sync = False
_LARGE_BYTES = 1024 * 1024
_RENAME_EXCHANGE = 2
_REMEDY = {
    errno.ENOSPC: "the disk is full; free space or remove old steps. Checkpoints committed before are untouched",
    errno.EDQUOT: "the disk quota is used up; free space or remove old steps. Checkpoints committed before are untouched",
    errno.EFBIG: "the file-size limit is reached (ulimit -f). Checkpoints committed before are untouched",
    errno.EROFS: "the file system is read-only; give a run folder that can be written",
    errno.EACCES: "permission denied; give a run folder that this user can write",
    errno.ENOTDIR: "a part of that path is a file or, below the run's folder, a link; give the path of a run folder",
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
        raise StorageError(f"cannot {action} {path}: {e.strerror or e} — {_remedy(e.errno or 0, path)}") from e


def _remedy(code: int, path: str) -> str:
    """Return what to do about a refusal. A file system without room for a further file says that it is full, too."""
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    if code == errno.ENOSPC and (found := os.statvfs(path)).f_files and not found.f_favail:
        return "no inodes are left, though there may be room; remove files or old steps. Checkpoints committed before are untouched"
    return _REMEDY.get(code, "see the system log")


class _LocalWriter:
    """A large file takes its room at once, so that a full disk is found before anything is written, and bypasses the page cache for as
    long as the data come in whole pages: copying them there takes processor time, which belongs to training."""

    def __init__(self, folder: int, name: str, path: str, size_bytes: int) -> None:
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._direct = getattr(os, "O_DIRECT", 0) if size_bytes >= _LARGE_BYTES else 0
        try:
            self._fd = os.open(name, flags | self._direct, 0o644, dir_fd=folder)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = 0  # not on this file system, which has made the file all the same
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            self._fd = os.open(name, flags, 0o644, dir_fd=folder)
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
        with _told("create", self.path(path)), self._parent(path) as (folder, name):
            return _LocalWriter(folder, name, self.path(path), size_bytes)

    def link(self, path: str, name: str) -> bool:
        try:
            with self._parent(path) as (source, old), self._parent(name) as (target, new):
                os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except OSError as e:
            if e.errno in _NO_LINKS:
                return False
            with _told("link", self.path(name)):
                raise
        return True

    def stamp(self, path: str) -> tuple[int, ...] | None:
        with _told("look at", self.path(path)):
            try:
                found = os.lstat(self.path(path))
            except FileNotFoundError:
                return None
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None

    def make_folder(self, path: str) -> None:
        with _told("create folder", self.path(path)):
            missing, folder = [], self.root
            while not os.path.isdir(folder) and folder != os.path.dirname(folder):
                missing.append(folder)
                folder = os.path.dirname(folder)
            os.makedirs(self.root, exist_ok=True)
            for made in missing:
                _sync(os.path.dirname(made))
            at = ""
            for part in path.split("/") if path else ():
                with contextlib.suppress(FileExistsError), self._folder(at) as above:
                    os.mkdir(part, dir_fd=above)
                    _sync(above)
                at = f"{at}/{part}" if at else part
            with self._folder(path):  # a file of that name is none
                pass

    def claim_folder(self, path: str) -> bool:
        with _told("create folder", self.path(path)), self._parent(path) as (folder, name):
            try:
                os.mkdir(name, dir_fd=folder)
            except FileExistsError:
                return False
            _sync(folder)
        return True

    def publish(self, hidden: str, visible: str) -> None:
        with self._parent(hidden) as (folder, attempt), self._parent(visible) as (run, name):
            with _told("rename", self.path(hidden)):
                replaced = _replace(folder, attempt, run, name) if os.path.lexists(self.path(visible)) else ""
                if not replaced:
                    os.rename(attempt, name, src_dir_fd=folder, dst_dir_fd=run)
                _sync(run)
            if replaced:
                _discard(folder, replaced)

    def rename(self, folder: str, name: str) -> None:
        with _told("rename", self.path(folder)):
            if os.path.lexists(self.path(name)):  # an empty folder would be replaced without a word
                raise FileExistsError(errno.EEXIST, f"{name} exists", self.path(folder))
            with self._parent(folder) as (source, old), self._parent(name) as (target, new):
                os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
                _sync(target)

    def point(self, path: str, text: str, within: str) -> None:
        temporary = f"{within}/{os.path.basename(path)}.{os.urandom(6).hex()}"
        with _told("write", self.path(path)), self._parent(temporary) as (source, old), self._parent(path) as (target, new):
            writer = _LocalWriter(source, old, self.path(path), 0)
            try:
                try:
                    writer.write(memoryview(text.encode()))
                except BaseException:
                    writer.abandon()
                    raise
                writer.close()
                os.replace(old, new, src_dir_fd=source, dst_dir_fd=target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(old, dir_fd=source)
                raise
            _sync(target)

    def sync_folder(self, path: str) -> None:
        with _told("sync folder", self.path(path)), self._folder(path) as folder:
            _sync(folder)

    def remove(self, path: str) -> None:
        with _told("remove", self.path(path)), self._parent(path) as (folder, name):
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                shutil.rmtree(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)

    def drop_folder(self, path: str) -> bool:
        with _told("remove", self.path(path)), contextlib.suppress(FileNotFoundError), self._parent(path) as (folder, name):
            try:
                os.rmdir(name, dir_fd=folder)
                return True
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return False

    @contextmanager
    def _folder(self, path: str) -> Iterator[int]:
        """Open a folder below the root, link by link of the way: where others can write, a name may become a link to elsewhere."""
        folder = os.open(self.root, _FOLDER)
        try:
            for part in path.split("/") if path else ():
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """Open the folder that ``path`` lies in; its name there."""
        above, _, name = path.rpartition("/")
        with self._folder(above) as folder:
            yield folder, name


def _sync(folder: int | str) -> None:
    """Sync a folder's names. Some file systems (CIFS, some of FUSE) have no such call, which is reported once."""
    global _reported_no_sync
    fd = os.open(folder, _FOLDER) if isinstance(folder, str) else folder
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NO_SYNC:
            raise
        if not _reported_no_sync:
            _reported_no_sync = True
            where = os.readlink(f"/proc/self/fd/{fd}") if os.path.exists(f"/proc/self/fd/{fd}") else folder
            logger.warning("the file system of %s cannot sync folders (%s): a step may be lost to a power failure soon after it", where, e.strerror)
    finally:
        if fd != folder:
            os.close(fd)


def _replace(folder: int, attempt: str, run: int, name: str) -> str:
    """Put ``attempt`` in the place of ``name``; returns under which name the old one now lies in ``folder``, hidden.

    In one step where the system can exchange two names (Linux, most local file systems), so that at no instant is there none.
    Elsewhere (NFS) in two: a kill between them leaves the old one under its hidden name.
    """
    if _exchange(folder, attempt, run, name):
        return attempt
    aside = f"{attempt}{REPLACED}"
    os.rename(name, aside, src_dir_fd=run, dst_dir_fd=folder)  # whole, as the name says: catalog.sweep restores it if there is no other
    try:
        os.rename(attempt, name, src_dir_fd=folder, dst_dir_fd=run)
    except OSError:
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=run)
        raise
    return aside


def _discard(folder: int, replaced: str) -> None:
    """Remove what was replaced. Best effort: it is hidden, and swept later. One in part must not pass for a whole one."""
    try:
        if replaced.endswith(REPLACED):
            removed = replaced.removesuffix(REPLACED) + REMOVED
            os.rename(replaced, removed, src_dir_fd=folder, dst_dir_fd=folder)
            _sync(folder)
            replaced = removed
        shutil.rmtree(replaced, ignore_errors=True, dir_fd=folder)
    except OSError:
        pass


def _exchange(folder: int, attempt: str, run: int, name: str) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in every C library
    if rename is None:
        return False
    if rename(folder, os.fsencode(attempt), run, os.fsencode(name), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
