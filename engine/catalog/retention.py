"""Which steps may go. Pure: nothing here deletes."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.catalog.lineage import line_to, ranked
from engine.format.manifest import Summary
from engine.format.names import step_name
from engine.options import whole


@dataclass(frozen=True)
class Retention:
    """What to keep of the current line of training, besides the latest step and the best one.

    ``last``: this many of the newest; None keeps everything, whatever the others say. ``every``: those whose number it divides.
    ``best``: this many by the monitored metric. Raises :class:`UsageError` for anything but whole numbers of at least 1.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None
    abandoned: bool = True
    """Whether steps of lines of training that were left, by a resume from an earlier step, stay."""

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole(f"keep_{name}", value, 1))


def expired(steps: Sequence[tuple[str, Summary]], latest: str, retention: Retention) -> list[str]:
    """The folders of ``steps`` to delete, oldest first, once ``latest`` is the newest.

    Steps of lines that were left stay where ``retention.abandoned`` says so: nobody knows which of them is wanted. So does
    everything if ``latest`` is not among ``steps``, because then the current line is not known.
    """
    head = dict(steps).get(latest)
    if retention.last is None or head is None:
        return []
    line = line_to(head, steps)
    kept = _for_now(line, latest, head, retention)
    if retention.every is not None:
        kept.update(name for name, s in line if s.step % retention.every == 0)
    left = [] if retention.abandoned else left_behind(steps, latest)
    return [name for name, _ in sorted([*line, *left], key=lambda step: step[1].step) if name not in kept]


def settled(steps: Sequence[tuple[str, Summary]], latest: str, retention: Retention) -> list[str]:
    """Return the folders of those ``steps`` that stay for good, as long as the line goes on: :func:`expired` need not hear of them."""
    head = dict(steps).get(latest)
    if retention.last is None or head is None:
        return []
    line = line_to(head, steps)
    kept = {*_for_now(line, latest, head, retention), *expired(steps, latest, retention)}
    return [name for name, _ in steps if name not in kept]


def _for_now(line: Sequence[tuple[str, Summary]], latest: str, head: Summary, retention: Retention) -> set[str]:
    """What is kept until newer or better steps come. What was once passed by them is never among the newest or best again."""
    assert retention.last is not None
    kept = {latest, step_name(head.best_step), *(name for name, _ in line[-retention.last :])}
    if retention.best is not None:
        kept.update(name for name, _ in ranked(line, head.monitor, head.mode)[: retention.best])
    return kept


def left_behind(steps: Sequence[tuple[str, Summary]], latest: str) -> list[tuple[str, Summary]]:
    """Return the steps that are not on the line that led to ``latest``."""
    head = dict(steps).get(latest)
    line = {name for name, _ in line_to(head, steps)} if head is not None else set[str]()
    return [(name, s) for name, s in steps if line and name not in line]
