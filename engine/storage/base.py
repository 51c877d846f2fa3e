"""What transfer and catalog ask of a storage. Paths are relative, with forward slashes, below the storage's root."""

from typing import Protocol


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

    def create(self, path: str) -> Writer:
        """A new file; an existing one of that name is an error."""
        ...

    def make_folder(self, path: str) -> None: ...

    def publish(self, hidden: str, visible: str) -> None:
        """Make a finished folder visible under its name, atomically and durably, replacing one that is there."""
        ...

    def point(self, path: str, text: str) -> None:
        """Replace a small text file atomically and durably."""
        ...

    def sync_folder(self, path: str) -> None: ...

    def remove_folder(self, path: str) -> None: ...
