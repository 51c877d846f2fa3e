"""What transfer and catalog ask of a storage. Paths are relative, with forward slashes, below the storage's root.

Every change of a run is a rename out of a job's own folder or into it (:mod:`engine.catalog.lease`), so the promise that all the others
rest on is this: of two renames that need one name, or a folder on the way to it, one succeeds, and the other is FileNotFoundError.
"""

from typing import Protocol

REPLACED = ".replaced"
"""Ends the name of a whole folder that is aside while another takes its place, where the two cannot be exchanged in one step."""
REMOVED = ".removed"
"""Ends the name of a folder that is being removed, perhaps in part."""


class Writer(Protocol):
    """A file being written, front to back."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None:
        """Durable when it returns: data and metadata are synced."""
        ...

    def abandon(self) -> None:
        """Close without syncing: the file is about to be deleted."""
        ...


class Reader(Protocol):
    """A file open for range reads."""

    size_bytes: int

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from ``offset``. Raises :class:`CheckpointCorrupt` if the file ends before."""
        ...

    def close(self) -> None: ...


class Storage(Protocol):
    """Errors of the medium (full, read-only, not permitted) are :class:`StorageError`; an absent path is FileNotFoundError."""

    root: str

    def names(self, folder: str) -> list[str]:
        """The entries of a folder, unsorted; none if it does not exist."""
        ...

    def exists(self, path: str) -> bool: ...

    def read(self, path: str, limit_bytes: int) -> bytes:
        """A whole small file. Raises :class:`CheckpointCorrupt` for one larger than the limit or not a regular file."""
        ...

    def open(self, path: str) -> Reader: ...

    def create(self, path: str, size_bytes: int = 0) -> Writer:
        """A new file; an existing one of that name is an error. ``size_bytes``: how large it will be, where that is known."""
        ...

    def link(self, path: str, name: str) -> bool:
        """Give a file a further name that nothing has, without a copy. False where the storage cannot, or the file is gone."""
        ...

    def stamp(self, path: str) -> tuple[int, ...] | None:
        """What a file is recognized by: a different one, or one that was written to since, has a different stamp. None where there is no
        regular file."""
        ...

    def make_folder(self, path: str) -> None:
        """Durably, with the folders above it. One that exists is no error."""
        ...

    def claim_folder(self, path: str) -> bool:
        """Make a folder of a name that nothing has, durably; False if something has it. Of several processes, one gets True."""
        ...

    def publish(self, hidden: str, visible: str) -> None:
        """Make a finished folder visible under its name, atomically and durably, replacing one that is there. What it replaces lies
        beside ``hidden`` until it is removed."""
        ...

    def rename(self, folder: str, name: str) -> None:
        """Give a folder a name that nothing has, atomically and durably. A name that is taken is a :class:`StorageError`."""
        ...

    def point(self, path: str, text: str, within: str) -> None:
        """Replace a small text file atomically and durably, by a rename out of the folder ``within``: FileNotFoundError where that is
        gone."""
        ...

    def sync_folder(self, path: str) -> None: ...

    def remove(self, path: str) -> None:
        """A file, or a folder with all that is in it, entry by entry: hide a folder by :meth:`rename` before, or a kill leaves half of it
        in view."""
        ...

    def drop_folder(self, path: str) -> bool:
        """Remove an empty folder; False where it is gone, or has something in it."""
        ...
