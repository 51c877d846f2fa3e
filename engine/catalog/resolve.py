"""``latest``, ``best``, ``epoch:N``, ``step:N`` or a path, to a committed step. Torch-free: the command line starts in an instant."""

import difflib
import logging
import os
from typing import Literal

from engine.catalog.history import current_line, is_on_line, latest_step
from engine.catalog.lineage import ranked, saved_last
from engine.catalog.listing import absent, read_manifest, read_summary, steps
from engine.catalog.pointers import read_pointer
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, UsageError
from engine.format.manifest import MANIFEST
from engine.format.names import BEST, LATEST, parse_step, step_name
from engine.options import local_path
from engine.storage import LocalStorage, Storage

__all__ = ["find", "read_manifest", "read_summary"]

logger = logging.getLogger("engine")


def find(run: str | os.PathLike[str], what: str, *, names: Literal["tolerate", "refuse"] = "tolerate") -> tuple[Storage, str]:
    """The storage and folder of the step that ``what`` names in ``run``.

    ``latest``; ``best`` by the monitored metric; ``epoch:N``, the last step of N completed epochs; ``step:N``; or a path to a step's
    folder or to another run (its latest). Where the run has several lines of training, ``best`` and ``epoch:N`` mean the one that
    led to the latest step; an epoch that only an abandoned line has is taken from there, with a warning.

    ``names``: what to do about folders that are called ``step_…`` but are no steps.

    Raises :class:`CheckpointNotFound` saying what there is instead, :class:`CheckpointCorrupt` where no manifest can be read or a name
    is refused, and :class:`UsageError` for a malformed ``what``.
    """
    if names not in ("tolerate", "refuse"):
        raise UsageError(f"names is {names!r}; folders with names that are no steps are 'tolerate'd or 'refuse'd")
    storage = LocalStorage(run)
    kind, _, number = what.partition(":")
    if what in (LATEST, BEST) or kind in ("epoch", "step"):
        if what not in (LATEST, BEST) and not (number.isdecimal() and len(number) < 20):
            raise UsageError(f"'{what}' names no checkpoint: after '{kind}:' comes a whole number, as in '{kind}:3'")
        if names == "refuse":
            _refuse_others(storage)
        if what in (LATEST, BEST):
            return storage, latest_step(storage) if what == LATEST else _best(storage)
        return storage, (_by_step if kind == "step" else _by_epoch)(storage, int(number))
    return _by_path(what, storage, names)


def _by_path(what: str, storage: Storage, names: str) -> tuple[Storage, str]:
    path = os.path.abspath(local_path("what to resume", what))
    if os.path.lexists(os.path.join(path, MANIFEST)):
        return LocalStorage(os.path.dirname(path)), os.path.basename(path)
    other = LocalStorage(path)
    if os.path.isdir(path) and names == "refuse":
        _refuse_others(other)
    if steps(other):
        return other, latest_step(other)
    if os.path.isdir(path):
        raise CheckpointNotFound(absent(f"'{what}' is neither a step nor a run with steps", storage))
    close = difflib.get_close_matches(what, (LATEST, BEST, "epoch:", "step:"), 1, 0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise CheckpointNotFound(absent(f"{hint}'{what}' is none of latest, best, epoch:N and step:N, and there is no folder {path}", storage))


def _refuse_others(storage: Storage) -> None:
    for name in sorted(storage.names("")):
        if not name.startswith("step_"):
            continue
        if parse_step(name) is None:
            raise CheckpointCorrupt(f"{storage.root}/{name} is not how a step is named (step_00001000, eight digits or more). Rename or remove it")
        if storage.exists(name) and not storage.exists(f"{name}/{MANIFEST}"):
            raise CheckpointCorrupt(f"{storage.root}/{name} is no complete step: it has no file '{MANIFEST}'. Restore it from a copy, or remove it")


def _best(storage: Storage) -> str:
    """What the latest step knows as the best of its line, else what the pointer names (a kill may have come before it was moved);
    where that step is gone, the best of those that are left, with a warning."""
    name, latest = read_pointer(storage, BEST), latest_step(storage)
    try:
        known = read_summary(storage, latest).best_step
    except EngineError:  # damaged: whatever the pointer names is the best that is known
        if any(step.name == name for step in steps(storage)):
            return name
        known = -1
    for best in (step_name(known) if known >= 0 else name, name):
        if is_on_line(storage, best, latest):
            return best
    _, line = current_line(storage)
    monitored = next((s for _, s in reversed(line) if s.monitor), None)
    if monitored is None:
        raise CheckpointNotFound(
            f"no best checkpoint is known in {storage.root}: no metric was monitored. Name one when saving (monitor=\"val_loss\"), or resume 'latest'"
        )
    order = ranked(line, monitored.monitor, monitored.mode)
    if not order:
        raise CheckpointNotFound(
            absent(f"no step has a value of {monitored.monitor}, the monitored metric, that is a number, so none is best", storage)
        )
    problem = f"names {name!r}, which is gone" if name else "is missing or unreadable"
    value = order[0][1].metrics[monitored.monitor]
    logger.warning("%s/%s %s; taking %s, the best there is (%s %g)", storage.root, BEST, problem, order[0][0], monitored.monitor, value)
    return order[0][0]


def _by_step(storage: Storage, number: int) -> str:
    for step in steps(storage):
        if step.number == number:
            return step.name
    raise CheckpointNotFound(absent(f"there is no step {number}", storage))


def _by_epoch(storage: Storage, number: int) -> str:
    problem = f"no checkpoint was saved after {number} completed epochs"
    if not steps(storage):
        raise CheckpointNotFound(absent(problem, storage))
    found, line = current_line(storage)
    here = [name for name, s in line if s.epoch == number]
    if here:
        return here[-1]
    elsewhere = saved_last((name, s) for name, s in found if s.epoch == number)
    if elsewhere is None:
        raise CheckpointNotFound(absent(problem, storage))
    logger.warning(
        "the line of training that led to %s has no checkpoint of %d completed epochs; taking %s, of a line that was left",
        line[-1][0], number, elsewhere[0],
    )  # fmt: skip
    return elsewhere[0]
