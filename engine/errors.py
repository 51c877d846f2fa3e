"""The one error tree. Every message says what was found, what was expected, where, and what to do.

    EngineError
    ├── UsageError               the call itself is wrong: a bad argument, an object no adapter knows
    ├── LayoutError              live state is not laid out as its adapter expects (checked on attach)
    ├── CheckpointNotFound       there is nothing to load under that name
    ├── CheckpointCorrupt        bytes are missing, truncated or changed
    ├── IncompatibleCheckpoint   a sound checkpoint that does not fit this run
    ├── StorageError             the storage refused: full, read-only, not permitted
    └── PeerError                another rank failed, differs, or did not answer in time

An error that one rank meets is raised on every rank, as the same class (see ``engine.sync``).
"""

from engine.printable import indented


class EngineError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what a command line should exit with. Messages quote checkpoints, which
    may be hostile: see :func:`engine.printable.indented`."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(indented(message))


class UsageError(EngineError):
    exit_code = 2


class LayoutError(EngineError):
    exit_code = 3


class CheckpointNotFound(EngineError):
    exit_code = 4


class CheckpointCorrupt(EngineError):
    exit_code = 5


class IncompatibleCheckpoint(EngineError):
    exit_code = 6


class StorageError(EngineError):
    exit_code = 7


class PeerError(EngineError):
    exit_code = 8


def error_class(name: str) -> type[EngineError]:
    """The class that a peer named; :class:`PeerError` for anything that is not of this tree."""
    return next((kind for kind in EngineError.__subclasses__() if kind.__name__ == name), PeerError)
