"""Commit: a hidden attempt becomes a visible step, only when every rank's part is durable."""

import contextlib

from engine.errors import EngineError, StorageError
from engine.format.manifest import MANIFEST, Manifest, encode_manifest
from engine.format.names import LATEST, step_name
from engine.storage import Storage
from engine.transfer.write import write_whole


def abort_attempt(storage: Storage, attempt: str) -> None:
    """Best effort: what is left is hidden and never listed."""
    with contextlib.suppress(EngineError, OSError):
        storage.remove_folder(attempt)


def commit_attempt(storage: Storage, attempt: str, manifest: Manifest) -> None:
    """Called on rank 0 after every rank has reported its files durable. ``latest`` moves last."""
    name = step_name(manifest.summary.step)
    write_whole(storage, f"{attempt}/{MANIFEST}", encode_manifest(manifest))
    storage.sync_folder(attempt)
    storage.publish(attempt, name)
    try:
        storage.point(LATEST, f"{name}\n")
    except EngineError as e:
        raise StorageError(f"{name} is committed, but '{LATEST}' could not be moved to it: {e}. Resume with step:{manifest.summary.step}") from e
