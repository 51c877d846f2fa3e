"""After a commit: ``best``, and what retention does not keep."""

import logging

from engine.catalog.history import is_on_line
from engine.catalog.listing import summaries
from engine.catalog.pointers import point_best
from engine.catalog.removal import delete_step
from engine.catalog.retention import Retention, expired
from engine.errors import EngineError
from engine.format.names import step_name
from engine.storage import Storage

logger = logging.getLogger("engine")


def tidy(storage: Storage, saved: str, best_step: int, retention: Retention) -> None:
    """``saved``: the folder that was committed; ``best_step``: -1 where there is none. A refusal of the storage is told, and left for
    the next save: the checkpoint itself is safe."""
    try:
        if best_step >= 0 and is_on_line(storage, best := step_name(best_step), saved):
            point_best(storage, best)
        for name in expired(summaries(storage), saved, retention) if retention.last else []:
            delete_step(storage, name)
    except (EngineError, OSError) as e:
        logger.warning("clearing up %s: %s", storage.root, e)
