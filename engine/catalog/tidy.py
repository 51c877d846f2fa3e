"""After a commit: ``best``, and what retention does not keep."""

import logging

from engine.catalog.history import is_on_line
from engine.catalog.listing import summaries
from engine.catalog.pointers import point_best
from engine.catalog.removal import delete_step
from engine.catalog.retention import Retention, expired, left_behind
from engine.errors import EngineError
from engine.events import warn_counted
from engine.format.names import step_name
from engine.storage import Storage

logger = logging.getLogger("engine")


def tidy(storage: Storage, saved: str, best_step: int, retention: Retention) -> None:
    """``saved``: the folder that was committed; ``best_step``: -1 where there is none. A refusal of the storage is told, and left for
    the next save: the checkpoint itself is safe."""
    try:
        if best_step >= 0 and is_on_line(storage, best := step_name(best_step), saved):
            point_best(storage, best)
        if retention.last:
            found = summaries(storage)
            for name in expired(found, saved, retention):
                delete_step(storage, name)
            if retention.abandoned and (left := [name for name, _ in left_behind(found, saved)]):
                warn_counted(
                    f"left {storage.root} {left}", "%d steps of lines of training that were left stay in %s: %s. keep_abandoned=False removes them",
                    len(left), storage.root, ", ".join(left[:6]) + (" …" if len(left) > 6 else ""),
                )  # fmt: skip
    except (EngineError, OSError) as e:
        logger.warning("clearing up %s: %s", storage.root, e)
