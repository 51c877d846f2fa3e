"""``run.json``: when a run began, and with what. For people, listings and trackers; no load depends on it. Torch-free."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointCorrupt
from engine.format.names import RUN_FILE, parse_run
from engine.storage import Storage

_MAX_BYTES = 1 << 26


def write_run_file(storage: Storage, config: Mapping[str, Any], lease: str, wandb_run_id: str = "") -> None:
    """Written once, atomically; afterwards only another ``wandb_run_id`` changes it. Raises :class:`StorageError`.

    It has the run's number, if the folder is called ``run_NNN``; the config's ``experiment_name``; when it was made; the config, as
    :func:`in_json`; and the tracker's id, if one is given. A file that is there but is not ours stays as it is.
    """
    if storage.exists(RUN_FILE):
        known = read_run_file(storage)
        if not known or not wandb_run_id or known.get("wandb_run_id") == wandb_run_id:
            return
        known["wandb_run_id"] = wandb_run_id
    else:
        known = {
            "run_number": parse_run(os.path.basename(storage.root)),
            "experiment_name": config.get("experiment_name"),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "wandb_run_id": wandb_run_id or None,
            "config": config,
        }
        known = {name: value for name, value in known.items() if value is not None}
    storage.point(RUN_FILE, json.dumps(known, indent=2) + "\n", lease)


def in_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as JSON can hold it: keys as text, and values of other types by their ``repr``."""
    return json.loads(json.dumps(_with_text_keys(config), default=repr))


def read_run_file(storage: Storage) -> dict[str, Any]:
    return read_object(storage, RUN_FILE)


def read_object(storage: Storage, path: str) -> dict[str, Any]:
    """What a file of one JSON object says; nothing where it is missing, unreadable, or no JSON object."""
    try:
        known = json.loads(storage.read(path, _MAX_BYTES))
    except (FileNotFoundError, CheckpointCorrupt, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _with_text_keys(value: Any) -> Any:
    """JSON has no other keys."""
    if isinstance(value, Mapping):
        return {str(k): _with_text_keys(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(v) for v in value]
    return value
