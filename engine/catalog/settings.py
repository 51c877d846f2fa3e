"""What a run was started with: for recipes whose flags default to those of the run they resume."""

from typing import Any

from engine.catalog.listing import read_manifest
from engine.errors import CheckpointCorrupt
from engine.format.record import decode_record
from engine.storage import Storage


def stored_config(storage: Storage, folder: str) -> dict[str, Any]:
    """The ``config`` that a step was saved with. Raises :class:`CheckpointCorrupt`."""
    record = decode_record(read_manifest(storage, folder).record)
    config = record.get("config") if isinstance(record, dict) else None
    if not isinstance(config, dict):
        raise CheckpointCorrupt(f"{storage.root}/{folder}: its record holds no config")
    return config
