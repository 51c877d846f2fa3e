"""A storage in memory, of which every call of the system's is a point where its job can be stopped, for a while or for ever.

Folders are opened and then used, as :class:`engine.storage.LocalStorage` does: one that has been renamed since is still the same.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

from engine.errors import CheckpointCorrupt, StorageError
from engine.storage.base import REMOVED, REPLACED

ROOT = "root"
Entry = str | bytes
"""A folder's number, or a file's bytes."""


class Disk:
    """Folders by number, each with its entries. One that is removed has no number any more: nothing can be put into it."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Entry]] = {ROOT: {}}

    def copy(self) -> "Disk":
        made = Disk()
        made.folders = {number: dict(entries) for number, entries in self.folders.items()}
        return made

    def key(self) -> tuple[Any, ...]:
        return tuple(sorted((number, tuple(sorted(entries.items(), key=lambda e: e[0]))) for number, entries in self.folders.items()))

    def find(self, path: str) -> Entry:
        found: Entry = ROOT
        for part in path.split("/") if path else ():
            found = self.inside(found)[part]
        return found

    def inside(self, folder: Entry) -> dict[str, Entry]:
        if not isinstance(folder, str):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        return self.folders[folder]

    def apply(self, call: str, args: tuple[Any, ...]) -> Any:
        """Carry out one call. A KeyError is a name, or a folder, that is not there."""
        return getattr(self, f"_{call}")(*args)

    def _open(self, path: str) -> str:
        folder = self.find(path)
        self.inside(folder)
        assert isinstance(folder, str)
        return folder

    def _exists(self, path: str) -> bool:
        with contextlib.suppress(KeyError, NotADirectoryError):
            self.find(path)
            return True
        return False

    def _names(self, path: str) -> tuple[str, ...]:
        with contextlib.suppress(KeyError):
            return tuple(sorted(self.inside(self.find(path))))
        return ()

    def _read(self, path: str) -> bytes:
        found = self.find(path)
        if isinstance(found, str):
            raise CheckpointCorrupt(f"{path} is not a regular file")
        return found

    def _is_folder(self, folder: str, name: str) -> bool:
        return isinstance(self.folders[folder][name], str)

    def _mkdir(self, folder: str, name: str, number: str) -> bool:
        entries = self.folders[folder]
        if name in entries:
            return False
        entries[name], self.folders[number] = number, {}
        return True

    def _create(self, folder: str, name: str, data: bytes) -> None:
        if name in self.folders[folder]:
            raise FileExistsError(errno.EEXIST, name)
        self.folders[folder][name] = data

    def _write(self, folder: str, name: str, data: bytes) -> None:
        """Of a file that is open: it may have been removed, and is written all the same."""
        if name in self.folders.get(folder, {}):
            self.folders[folder][name] = data

    def _inner(self, folder: str, name: str) -> str:
        found = self.folders[folder][name]
        assert isinstance(found, str)
        return found

    def _entries(self, folder: str) -> tuple[str, ...]:
        return tuple(sorted(self.folders.get(folder, ())))

    def _link(self, source: str, old: str, target: str, new: str) -> None:
        self._create(target, new, self.folders[source][old])  # type: ignore[arg-type]

    def _rename(self, source: str, old: str, target: str, new: str) -> None:
        moved, there = self.folders[source][old], self.folders[target].get(new)
        if isinstance(there, str) and self.folders[there]:
            raise OSError(errno.ENOTEMPTY, new)
        del self.folders[source][old]
        self.folders[target][new] = moved

    def _exchange(self, source: str, old: str, target: str, new: str) -> None:
        a, b = self.folders[source], self.folders[target]
        a[old], b[new] = b[new], a[old]

    def _unlink(self, folder: str, name: str) -> None:
        del self.folders[folder][name]

    def _rmdir(self, folder: str, name: str) -> bool:
        number = self.folders[folder][name]
        if self.folders[number]:  # type: ignore[index]
            return False
        del self.folders[folder][name], self.folders[number]  # type: ignore[arg-type]
        return True


class _Reader:
    def __init__(self, path: str, data: bytes) -> None:
        self._path, self._data, self.size_bytes = path, data, len(data)

    def read_into(self, offset: int, target: memoryview) -> None:
        if offset + len(target) > len(self._data):
            more = offset + len(target) - len(self._data)
            raise CheckpointCorrupt(f"{self._path} is truncated: it ends at byte {len(self._data)}, {more} more are expected")
        if target:
            target[:] = self._data[offset : offset + len(target)]

    def close(self) -> None: ...


class _Writer:
    def __init__(self, finish: Callable[[bytes], None]) -> None:
        self._data, self._finish = bytearray(), finish

    def write(self, data: memoryview) -> None:
        self._data += data

    def close(self) -> None:
        self._finish(bytes(self._data))

    def abandon(self) -> None: ...


class MemoryStorage:
    """See :class:`engine.storage.base.Storage`. ``call``: carries out one call on the disk; ``can_exchange``: whether two names can be
    exchanged in one; ``job``: a digit, of which the names that this makes up begin."""

    def __init__(self, call: Callable[..., Any], can_exchange: bool = True, job: int = 0) -> None:
        self.root = "memory"
        self._do, self._can_exchange, self._job, self._made = call, can_exchange, job, 0

    def names(self, folder: str) -> list[str]:
        return list(self._call("names", folder))

    def exists(self, path: str) -> bool:
        return self._call("exists", path)

    def read(self, path: str, limit_bytes: int) -> bytes:
        data = self._call("read", path)
        if len(data) > limit_bytes:
            raise CheckpointCorrupt(f"{path} has {len(data)} bytes, at most {limit_bytes} are expected")
        return data

    def open(self, path: str) -> _Reader:
        return _Reader(path, self._call("read", path))

    def create(self, path: str, size_bytes: int = 0) -> _Writer:
        folder, name = self._parent(path)
        try:
            self._call("create", folder, name, b"")
        except StorageError as e:
            raise StorageError(f"{path}: {e}") from e
        return _Writer(lambda data: self._call("write", folder, name, data))

    def link(self, path: str, name: str) -> bool:
        try:
            self._call("link", *self._parent(path), *self._parent(name))
        except FileNotFoundError:
            return False
        return True

    def stamp(self, path: str) -> tuple[int, ...] | None:
        try:
            return (hash(self._call("read", path)),)
        except (FileNotFoundError, CheckpointCorrupt):
            return None

    def make_folder(self, path: str) -> None:
        at = ""
        for part in path.split("/") if path else ():
            self._call("mkdir", self._call("open", at), part, self._number())
            at = f"{at}/{part}" if at else part

    def claim_folder(self, path: str) -> bool:
        return self._call("mkdir", *self._parent(path), self._number())

    def publish(self, hidden: str, visible: str) -> None:
        (folder, attempt), (run, name) = self._parent(hidden), self._parent(visible)
        replaced = ""
        if self._call("exists", visible):
            replaced = self._replace(folder, attempt, run, name)
        else:
            self._call("rename", folder, attempt, run, name)
        with contextlib.suppress(StorageError, FileNotFoundError):
            if replaced.endswith(REPLACED):
                removed = replaced.removesuffix(REPLACED) + REMOVED
                self._call("rename", folder, replaced, folder, removed)
                replaced = removed
            if replaced:
                self._remove(folder, replaced)

    def _replace(self, folder: str, attempt: str, run: str, name: str) -> str:
        if self._can_exchange:
            self._call("exchange", folder, attempt, run, name)
            return attempt
        aside = f"{attempt}{REPLACED}"
        self._call("rename", run, name, folder, aside)
        try:
            self._call("rename", folder, attempt, run, name)
        except (StorageError, FileNotFoundError):
            self._call("rename", folder, aside, run, name)
            raise
        return aside

    def rename(self, folder: str, name: str) -> None:
        if self._call("exists", name):
            raise StorageError(f"cannot rename {folder}: {name} exists — the name is taken; remove or rename what is there")
        self._call("rename", *self._parent(folder), *self._parent(name))

    def point(self, path: str, text: str, within: str) -> None:
        self._made += 1
        temporary = f"{path}.{self._job:x}{self._made:011x}"
        source, (target, name) = self._call("open", within), self._parent(path)
        self._call("create", source, temporary, text.encode())
        self._call("rename", source, temporary, target, name)

    def sync_folder(self, path: str) -> None: ...

    def remove(self, path: str) -> None:
        self._remove(*self._parent(path))

    def drop_folder(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._call("rmdir", *self._parent(path))
        return False

    def _remove(self, folder: str, name: str) -> None:
        if not self._call("is_folder", folder, name):
            self._call("unlink", folder, name)
            return
        inner = self._call("inner", folder, name)
        for entry in self._call("entries", inner):
            self._remove(inner, entry)
        if not self._call("rmdir", folder, name):
            raise StorageError(f"cannot remove {name}: not empty")

    def _parent(self, path: str) -> tuple[str, str]:
        above, _, name = path.rpartition("/")
        return self._call("open", above), name

    def _number(self) -> str:
        self._made += 1
        return f"folder {self._job}.{self._made}"

    def _call(self, call: str, *args: Any) -> Any:
        with _told(call):
            return self._do(call, args)


@contextlib.contextmanager
def _told(call: str) -> Iterator[None]:
    try:
        yield
    except KeyError as e:
        raise FileNotFoundError(errno.ENOENT, str(e)) from None
    except FileNotFoundError:
        raise
    except OSError as e:
        raise StorageError(f"cannot {call}: {e} — the name is taken" if isinstance(e, FileExistsError) else f"cannot {call}: {e}") from e
