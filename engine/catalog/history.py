"""What a run's steps say of its lines of training: the latest step, the line that led to it, what came before, what comes after."""

import logging

from engine.catalog.lineage import Named, descends_from, line_to, next_lineage, saved_last
from engine.catalog.listing import absent, read_summary, steps, summaries
from engine.catalog.pointers import read_pointer
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError
from engine.format.manifest import Line
from engine.format.names import LATEST, parse_hidden, parse_lease, parse_step
from engine.storage import Storage

logger = logging.getLogger("engine")


def latest_step(storage: Storage) -> str:
    """What the pointer names; the step saved last, with a warning, where the pointer is lost or names a removed step."""
    found = steps(storage)
    if not found:
        raise CheckpointNotFound(absent("there is no checkpoint", storage))
    name = read_pointer(storage, LATEST)
    if any(step.name == name for step in found):
        return name
    last = saved_last(summaries(storage))
    if last is None:
        raise CheckpointCorrupt(f"{storage.root} has {len(found)} steps, but none has a manifest that can be read. Restore one from a copy")
    problem = f"names {name!r}, which is gone" if name else "is missing or unreadable"
    logger.warning("%s/%s %s; taking %s, the step saved last", storage.root, LATEST, problem, last[0])
    return last[0]


def current_line(storage: Storage) -> tuple[list[Named], list[Named]]:
    """Every readable step, and those of them on the way to the latest. Raises as ``find(run, "latest")`` does."""
    latest, found = latest_step(storage), summaries(storage)
    head = dict(found).get(latest)
    if head is None:
        last = saved_last(found)
        if last is None:
            raise CheckpointCorrupt(f"{storage.root} has no step with a manifest that can be read. Restore one from a copy")
        logger.warning("%s cannot be read, so its line of training is not known; taking that of %s, the step saved last", latest, last[0])
        head = last[1]
    return found, line_to(head, found)


def is_on_line(storage: Storage, name: str, latest: str) -> bool:
    """Whether the step in folder ``name`` is there, and on the way to ``latest``. A pointer's text is no name until it parses."""
    if parse_step(name) is None:
        return False
    try:
        return descends_from(read_summary(storage, latest), read_summary(storage, name))
    except EngineError:
        return False


def previous(storage: Storage, folder: str) -> str | None:
    """The step to fall back on where ``folder`` turns out to be damaged: the nearest on the way to it.

    If not even its summary can be read, its line is not known: then the step saved last, of the others. None if there is none.
    """
    others = [(name, s) for name, s in summaries(storage) if name != folder]
    try:
        line = line_to(read_summary(storage, folder), others)
    except EngineError:
        last = saved_last(others)
        return last[0] if last else None
    return line[-1][0] if line else None


def lineage_after(storage: Storage, parent_folder: str | None, name: str) -> tuple[Line, ...]:
    """The lineage of what is saved after the step in ``parent_folder``, or after a fresh start where there is none.

    ``name`` is for a new line, should one begin; no line of the run may have it. A parent that is gone or unreadable counts as none,
    with a warning. Call it on resuming, while the parent is there.
    """
    if not parent_folder:
        return next_lineage(None, (), name)
    try:
        parent = read_summary(storage, parent_folder)
    except CheckpointCorrupt as e:
        logger.warning("what is saved from now on is a line of its own, because its parent cannot be read: %s", e)
        return next_lineage(None, (), name)
    found = summaries(storage)
    lineage = next_lineage(parent, (s for _, s in found), name)
    if lineage == parent.lineage and any(number > parent.step for number in _unknown(storage, found)):
        return (*lineage, Line(name, parent.step))
    return lineage


def _unknown(storage: Storage, found: list[Named]) -> set[int]:
    """The numbers of steps that may be of any line: not readable, perhaps only by this version, or aside until a sweep restores them."""
    hidden = [parse_hidden(name) for lease in storage.names("") if parse_lease(lease) is not None for name in storage.names(lease)]
    aside = [parse_step(h.step) for h in hidden if h is not None and h.state == "replaced"]
    numbers = {step.number for step in steps(storage)} | {number for number in aside if number is not None}
    return numbers - {s.step for _, s in found}
