"""Deleting. A step is hidden before it is removed, so that a kill at any instant leaves no half of one in view."""

import contextlib
import logging
from collections.abc import Iterator

from engine.catalog.listing import read_summary
from engine.errors import EngineError, UsageError
from engine.format.manifest import MANIFEST
from engine.format.names import Hidden, attempt_name, parse_hidden, parse_step
from engine.storage import Storage
from engine.storage.base import REMOVED, REPLACED

logger = logging.getLogger("engine")


def delete_step(storage: Storage, name: str) -> None:
    """Delete the step in folder ``name``, atomically for whoever looks. The one place that deletes a step.

    One that is gone already is no error, and what the medium will not remove stays hidden, for :func:`sweep`.
    Raises :class:`StorageError` if it cannot even be hidden, and :class:`UsageError` for a name that is no step's.
    """
    if parse_step(name) is None:
        raise UsageError(f"{name!r} is no step's folder; a step is deleted by its name, such as step_00001000")
    for left, hidden in _ours(storage).items():
        if hidden.step == name and hidden.state == "replaced":
            _discard(storage, left, name)  # or a sweep would restore it in the place of what is deleted now
    _discard(storage, name, name)


def sweep(storage: Storage, keep: str = "") -> None:
    """Clear up after killed saves and deletions: :func:`restore`, then remove what they hid.

    ``keep`` is the job whose saves may be under way (see :mod:`engine.catalog.lease`); nobody else may be saving into this run. Names
    that are not ours are left alone.
    Best effort: what the medium refuses is logged.
    """
    restore(storage, keep)
    for name, hidden in _ours(storage, keep).items():
        with _logged(storage, name):
            if hidden.state != "replaced":
                _remove(storage, name)
            elif storage.exists(f"{hidden.step}/{MANIFEST}") or not storage.exists(f"{name}/{MANIFEST}"):  # else it is all there is of it
                _discard(storage, name, hidden.step)


def restore(storage: Storage, keep: str = "") -> None:
    """Put a step back that was aside for a replacement that never came: on storage that cannot exchange two names, a kill between
    two renames leaves none in view. Best effort, as :func:`sweep`; unlike it, this removes nothing."""
    aside: dict[str, list[str]] = {}
    for name, hidden in _ours(storage, keep).items():
        if hidden.state == "replaced" and storage.exists(f"{name}/{MANIFEST}") and not storage.exists(hidden.step):
            aside.setdefault(hidden.step, []).append(name)
    for step, names in aside.items():
        newest = max(names, key=lambda name: (storage.exists(name.removesuffix(REPLACED)), _created(storage, name)))
        with _logged(storage, newest):
            storage.rename(newest, step)
            logger.warning("%s/%s is restored: a save was about to replace it when it was killed", storage.root, step)


def _ours(storage: Storage, keep: str = "") -> dict[str, Hidden]:
    found = {name: hidden for name in sorted(storage.names("")) if (hidden := parse_hidden(name)) is not None}
    return {name: hidden for name, hidden in found.items() if not hidden.is_of(keep)}


def _created(storage: Storage, folder: str) -> float:
    try:
        return read_summary(storage, folder).created
    except EngineError:
        return float("-inf")


def _discard(storage: Storage, name: str, step: str) -> None:
    """Hide a whole folder as one that is being removed, durably; only then remove it."""
    removed = f"{attempt_name(step)}{REMOVED}"
    with contextlib.suppress(FileNotFoundError):
        storage.rename(name, removed)
        with _logged(storage, removed):
            _remove(storage, removed)


def _remove(storage: Storage, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it too
        storage.remove_folder(name)


@contextlib.contextmanager
def _logged(storage: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except (EngineError, FileNotFoundError) as e:
        logger.warning("%s/%s is left over and was not cleared up: %s", storage.root, name, e)
