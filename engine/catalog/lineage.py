"""Lines of training. Resuming an earlier step and saving anew begins a line of its own; what was saved after that step on the
line before stays, but is never taken for the run's present. Pure."""

from collections.abc import Iterable

from engine.format.manifest import Line, Summary
from engine.format.names import attempt_order

Named = tuple[str, Summary]
"""A step's folder, and the head of its manifest."""


def descends_from(step: Summary, ancestor: Summary) -> bool:
    """Whether ``ancestor`` is on the way to ``step``, or is ``step``."""
    depth = len(ancestor.lineage)
    if step.lineage[:depth] != ancestor.lineage:
        return False
    return ancestor.step <= (step.lineage[depth].parent_step if len(step.lineage) > depth else step.step)


def next_lineage(parent: Summary | None, existing: Iterable[Summary], name: str) -> tuple[Line, ...]:
    """The lineage of what is saved after ``parent``: its own while it is the last of its line, else with a new line ``name``."""
    if parent is None:
        return (Line(name, 0),)
    overtaken = any(step.step > parent.step and descends_from(step, parent) for step in existing)
    return (*parent.lineage, Line(name, parent.step)) if overtaken else parent.lineage


def line_to(step: Summary, found: Iterable[Named]) -> list[Named]:
    """Those of ``found`` that are on the way to ``step``, by number; ``step`` itself is the last, if it is among them."""
    return sorted(((name, s) for name, s in found if descends_from(step, s)), key=lambda named: named[1].step)


def saved_last(found: Iterable[Named]) -> Named | None:
    """Return the step that was saved last, whatever the line: of the newest lease the last attempt. The clock, which may have been set
    back, counts where the attempts say nothing."""
    return max(found, key=lambda named: (attempt_order(named[1].attempt) or (0, 0), named[1].created, named[1].step), default=None)


def ranked(found: Iterable[Named], monitor: str, mode: str) -> list[Named]:
    """The best first, by the metric ``monitor``: the smallest unless ``mode`` is ``max``. Steps without it, or where it is NaN, are
    left out; of equals the earlier step is better."""
    sign = -1 if mode == "max" else 1
    valued = [(sign * s.metrics.get(monitor, float("nan")), s.step, (name, s)) for name, s in found if monitor]
    return [named for value, _, named in sorted((v for v in valued if v[0] == v[0]), key=lambda v: v[:2])]
