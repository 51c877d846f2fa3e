"""Commit: a hidden attempt becomes a visible step, only when every rank's part is durable."""

from engine.errors import EngineError, StorageError
from engine.format.manifest import MANIFEST, Manifest, encode_manifest
from engine.format.names import LATEST, step_name
from engine.storage import Storage
from engine.transfer.write import write_whole


def commit_attempt(storage: Storage, attempt: str, manifest: Manifest) -> None:
    """Called on rank 0 after every rank has reported its files durable. ``latest`` moves last."""
    name = step_name(manifest.summary.step)
    write_whole(storage, f"{attempt}/{MANIFEST}", encode_manifest(manifest))
    storage.sync_folder(attempt)
    storage.publish(attempt, name)
    point_latest(storage, name, attempt)


def point_latest(storage: Storage, name: str, attempt: str) -> None:
    """Let ``latest`` name the step that ``attempt`` has become."""
    try:
        storage.point(LATEST, f"{name}\n", attempt.rpartition("/")[0])
    except (EngineError, FileNotFoundError) as e:
        raise StorageError(f"{name} is committed, but '{LATEST}' could not be moved to it: {e}. Resume with step:{int(name[5:])}") from e
