"""Commit: a hidden attempt becomes a visible step, only when every rank's part is durable."""

import contextlib
import json
import os
import time
from typing import Any

from engine.errors import EngineError, StorageError
from engine.format.manifest import MANIFEST, Manifest, encode
from engine.format.names import LATEST, RUN_FILE, step_name
from engine.storage import Storage
from engine.transfer.write import write_whole


def begin_attempt(storage: Storage, step: int) -> str:
    """Create the hidden folder that the ranks write into; returns its name. Called on rank 0."""
    storage.make_folder("")
    attempt = f".{step_name(step)}.{os.urandom(6).hex()}"
    storage.make_folder(attempt)
    return attempt


def abort_attempt(storage: Storage, attempt: str) -> None:
    """Best effort: what is left is hidden and never listed."""
    with contextlib.suppress(EngineError, OSError):
        storage.remove_folder(attempt)


def commit_attempt(storage: Storage, attempt: str, manifest: Manifest) -> None:
    """Called on rank 0 after every rank has reported its files durable. ``latest`` moves last."""
    name = step_name(manifest.step)
    write_whole(storage, f"{attempt}/{MANIFEST}", encode(manifest))
    storage.sync_folder(attempt)
    storage.publish(attempt, name)
    try:
        storage.point(LATEST, f"{name}\n")
    except EngineError as e:
        raise StorageError(f"{name} is committed, but '{LATEST}' could not be moved to it: {e}. Resume with step:{manifest.step}") from e


def write_run_file(storage: Storage, config: dict[str, Any]) -> None:
    """``run.json``: when the run began and with what. Written once, for people and listings; no load depends on it."""
    if not storage.exists(RUN_FILE):
        text = json.dumps({"created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "config": config}, indent=2, default=repr)
        storage.point(RUN_FILE, text + "\n")
