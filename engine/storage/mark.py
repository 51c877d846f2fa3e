"""Whether all ranks see one folder: rank 0 leaves a file there for a moment, which the others look for."""

import contextlib
import os
import time

from engine.errors import UsageError
from engine.storage.local import LocalStorage

_PATIENCE_SECONDS = 5.0
"""For network file systems that show a new file of a different node late."""


class Mark:
    """In the run's folder, or the nearest one above that exists."""

    def __init__(self, storage: LocalStorage) -> None:
        self._root = storage.root
        self._left = ""

    def leave(self) -> str:
        """Leave it, on rank 0. Return its path, or "" where nothing can be written: a run that is only read needs none."""
        folder = self._root
        while not os.path.isdir(folder) and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        path = os.path.join(folder, f".lockstep_{os.urandom(8).hex()}")
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except OSError:
            return ""
        self._left = path
        return path

    def look_for(self, path: str, rank: int) -> None:
        """Raises :class:`UsageError` where this rank does not see it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while path and not os.path.lexists(path):
            if time.monotonic() > deadline:
                raise UsageError(
                    f"rank {rank} does not see the folder that rank 0 does: {path}, which rank 0 has just made, is not there. The run's folder "
                    f"{self._root} must be on storage that all ranks share, not on the disk of each node"
                )
            time.sleep(0.05)

    def remove(self) -> None:
        """Remove what this rank has left. One that cannot be removed is an empty, hidden file."""
        if self._left:
            with contextlib.suppress(OSError):
                os.unlink(self._left)
