"""After a commit: ``best``, and what retention does not keep."""

import logging
from functools import partial

from engine.catalog.lease import HOLDER
from engine.catalog.lineage import descends_from
from engine.catalog.listing import read_summary, summaries
from engine.catalog.pointers import point_best
from engine.catalog.removal import clear, delete_step
from engine.catalog.retention import Retention, expired, left_behind, settled
from engine.errors import EngineError
from engine.events import warn_counted
from engine.format.manifest import Summary
from engine.format.names import attempt_order, step_name
from engine.storage import Storage

logger = logging.getLogger("engine")


class Tidying:
    """What one job knows of its run's steps from save to save, so that a save costs the same however many are kept: every manifest is
    read at the first one, and at the first after a resume from an earlier step; later only steps that may still go are looked at."""

    def __init__(self, storage: Storage, retention: Retention) -> None:
        self._storage, self._retention = storage, retention
        self._open: dict[str, Summary] | None = None
        self._head: Summary | None = None

    def after(self, saved: Summary) -> None:
        """Called after each commit. A refusal of the storage is reported, and left for the next save: the checkpoint itself is safe."""
        storage, name = self._storage, step_name(saved.step)
        lease, _, _ = saved.attempt.partition("/")
        try:
            clear(storage, lease, partial(_stays, saved.attempt))
            if saved.best_step >= 0 and self._is_on_line(best := step_name(saved.best_step), saved):
                point_best(storage, best, lease)
            if self._retention.last:
                self._retain(name, saved, lease)
        except (EngineError, OSError) as e:
            logger.warning("clearing up %s: %s", storage.root, e)

    def _is_on_line(self, name: str, saved: Summary) -> bool:
        try:
            return name == step_name(saved.step) or descends_from(saved, read_summary(self._storage, name))
        except EngineError:
            return False

    def _retain(self, name: str, saved: Summary, lease: str) -> None:
        if self._open is None or self._head is None or self._head.lineage != saved.lineage:
            self._open = dict(summaries(self._storage))
            self._report_left(name)
        self._open[name], self._head = saved, saved
        for gone in expired(list(self._open.items()), name, self._retention):
            delete_step(self._storage, gone, lease)
            del self._open[gone]
        for kept in settled(list(self._open.items()), name, self._retention):
            del self._open[kept]

    def _report_left(self, name: str) -> None:
        assert self._open is not None
        root = self._storage.root
        if self._retention.abandoned and (left := [step for step, _ in left_behind(list(self._open.items()), name)]):
            warn_counted(
                f"left {root} {left}", "%d steps of lines of training that were left stay in %s: %s. keep_abandoned=False removes them",
                len(left), root, ", ".join(left[:6]) + (" …" if len(left) > 6 else ""),
            )  # fmt: skip


def _stays(attempt: str, left: str) -> bool:
    """Whether what lies in the lease's folder is in use: what says whose it is, and saves that other ranks have begun since."""
    order, last = attempt_order(f"{attempt.partition('/')[0]}/{left}"), attempt_order(attempt)
    return left == HOLDER or (order is not None and last is not None and order > last)
