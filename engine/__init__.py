"""lockstep: sharded checkpoints for DeepSpeed ZeRO, FSDP2 and DDP that any of them loads, at any world size, bit-exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.printable import escape_log

if TYPE_CHECKING:
    from engine.checkpointer import Checkpointer
    from engine.data import ElasticSampler
    from engine.export import export_model
    from engine.state.frozen_rows import freeze_rows
    from engine.state.objects import PerRank
    from engine.state.progress import Progress

escape_log()

__all__ = ["Checkpointer", "ElasticSampler", "PerRank", "Progress", "export_model", "freeze_rows"]

_HOMES = {
    "Checkpointer": "engine.checkpointer",
    "ElasticSampler": "engine.data",
    "PerRank": "engine.state.objects",
    "Progress": "engine.state.progress",
    "export_model": "engine.export",
    "freeze_rows": "engine.state.frozen_rows",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: ``engine.errors`` and the catalogue commands come without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
