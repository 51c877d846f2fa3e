"""``latest`` and ``best``: files of one line. They are a convenience: nothing depends on a sound one."""

from engine.errors import CheckpointCorrupt
from engine.format.names import BEST
from engine.storage import Storage

_MAX_POINTER_BYTES = 4096


def read_pointer(storage: Storage, pointer: str) -> str:
    """The step folder that it names, which may be gone; nothing where the pointer is lost or unreadable."""
    try:
        return storage.read(pointer, _MAX_POINTER_BYTES).decode(errors="replace").strip()
    except (FileNotFoundError, CheckpointCorrupt):
        return ""


def point_best(storage: Storage, name: str, lease: str) -> None:
    """Let ``best`` name this step. Not written where it does so already: the best seldom changes. Raises :class:`StorageError`."""
    if read_pointer(storage, BEST) != name:
        storage.point(BEST, f"{name}\n", lease)
