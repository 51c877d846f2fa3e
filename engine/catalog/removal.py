"""Deleting. A step is hidden before it is removed, so that a kill at any instant leaves no half of one in view.

Of a rename that hides an attempt and the one that would commit it, one succeeds: so nothing that is being removed can come into view.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

from engine.catalog.listing import read_summary
from engine.errors import EngineError, UsageError
from engine.format.manifest import MANIFEST
from engine.format.names import is_fenced, parse_hidden, parse_step, removed_name
from engine.storage import Storage
from engine.storage.base import REPLACED

logger = logging.getLogger("engine")

_ROUNDS = 5
"""Of clearing a folder into which a job that has lost the run may still be putting something."""


def delete_step(storage: Storage, name: str, lease: str) -> None:
    """Delete the step in folder ``name``, atomically for whoever looks. The one place that deletes a step.

    One that is gone already is no error, and what the medium will not remove stays hidden, for :func:`sweep`.
    Raises :class:`StorageError` if it cannot even be hidden, FileNotFoundError where the lease is lost, and :class:`UsageError` for a
    name that is no step's.
    """
    if parse_step(name) is None:
        raise UsageError(f"{name!r} is no step's folder; a step is deleted by its name, such as step_00001000")
    for left in storage.names(lease):
        if (hidden := parse_hidden(left)) is not None and hidden.step == name and hidden.state == "replaced":
            discard(storage, f"{lease}/{left}", removed_name(lease, name))  # or it would be restored in the place of what is deleted now
    if storage.exists(name):
        discard(storage, name, removed_name(lease, name))


def sweep(storage: Storage) -> None:
    """Clear up after the jobs that have lost the run: restore the steps that they had aside, and remove all else that they left.

    Called by the job that has taken it. Best effort: what the medium refuses is logged.
    """
    for _ in range(_ROUNDS):
        folders = [name for name in storage.names("") if is_fenced(name)]
        if not folders:
            return
        restore(storage, folders)
        for folder in folders:
            with _logged(storage, folder):
                if clear(storage, folder):
                    storage.drop_folder(folder)


def clear(storage: Storage, folder: str, keep: Callable[[str], bool] = lambda name: False) -> bool:
    """Remove from a lease's folder what its job has left, but for what ``keep`` says, and a step that is aside and has no other in its
    place. Returns whether all is gone."""
    gone = True
    for name in storage.names(folder):
        path, hidden = f"{folder}/{name}", parse_hidden(name)
        is_all_there_is = hidden is not None and hidden.state == "replaced" and not storage.exists(f"{hidden.step}/{MANIFEST}")
        if keep(name) or (is_all_there_is and storage.exists(f"{path}/{MANIFEST}")):
            gone = False
            continue
        with _logged(storage, path):
            if hidden is None or hidden.state == "removed":
                _remove(storage, path)
            else:
                discard(storage, path, removed_name(folder, hidden.step))
    return gone


def restore(storage: Storage, folders: list[str]) -> None:
    """Put steps back that were aside for a replacement that never came: on storage that cannot exchange two names, a kill between
    two renames leaves none in view. Best effort."""
    aside: dict[str, list[str]] = {}
    for folder in folders:
        for name in storage.names(folder):
            hidden = parse_hidden(name)
            if hidden is not None and hidden.state == "replaced" and storage.exists(f"{folder}/{name}/{MANIFEST}"):
                aside.setdefault(hidden.step, []).append(f"{folder}/{name}")
    for step, paths in aside.items():
        if storage.exists(step):
            continue
        newest = max(paths, key=lambda path: (storage.exists(path.removesuffix(REPLACED)), _created(storage, path)))
        with _logged(storage, newest):
            storage.rename(newest, step)
            logger.warning("%s/%s is restored: a save was about to replace it when it was killed", storage.root, step)


def _created(storage: Storage, folder: str) -> float:
    try:
        return read_summary(storage, folder).created
    except EngineError:
        return float("-inf")


def discard(storage: Storage, path: str, removed: str) -> None:
    """Hide a whole folder as one that is being removed, durably; only then remove it. FileNotFoundError where it is gone."""
    storage.rename(path, removed)
    with _logged(storage, removed):
        _remove(storage, removed)


def _remove(storage: Storage, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it too
        storage.remove(path)


@contextlib.contextmanager
def _logged(storage: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:  # somebody else has cleared it up
        pass
    except EngineError as e:
        logger.warning("%s/%s is left over and was not cleared up: %s", storage.root, name, e)
