"""Numbered runs below a base folder: ``run_001``, ``run_002``, …"""

import logging
import math
import os
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from engine.catalog.history import current_line
from engine.catalog.lineage import ranked
from engine.catalog.listing import read_manifest, steps
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, UsageError
from engine.format.names import parse_run, run_name
from engine.format.record import decode_record
from engine.storage import LocalStorage, Storage
from engine.transfer.runfile import read_run_file

logger = logging.getLogger("engine")


class Run(Struct, frozen=True):
    """A run in a listing.

    ``experiment`` is empty and ``created`` (Unix seconds) None where nothing tells. ``steps`` are the checkpoints that are there;
    ``saves`` also counts those that clean-up or the user deleted, as far as the latest step's history has them. ``best`` is the best
    value of the metric ``monitor``; None where none is known.
    """

    number: int | None
    path: str
    experiment: str = ""
    created: float | None = None
    steps: int = 0
    saves: int = 0
    monitor: str = ""
    best: float | None = None
    best_step: int | None = None


def runs(base: str | os.PathLike[str]) -> list[Run]:
    """The runs right below ``base``, by number; none if it does not exist. What is damaged or deleted meanwhile is reported as far as
    it can be."""
    storage = LocalStorage(base)
    return [_describe(f"{storage.root}/{run_name(number)}", number) for number in _numbers(storage)]


def runs_below(base: str | os.PathLike[str]) -> list[Run]:
    """Every run below ``base``, whatever its name and however deep: folders that have committed steps, and those of numbered runs."""
    root, found = LocalStorage(base).root, []
    for folder, inner, _ in os.walk(root):
        inner.sort()
        number = parse_run(os.path.basename(folder)) if folder != root else None
        if number is not None or (folder != root and steps(LocalStorage(folder))):
            found.append(_describe(folder, number))
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]
    return found


def new_run(base: str | os.PathLike[str]) -> str:
    """Make the folder of a new run, one after the highest; returns its path. No two processes are given the same.

    Raises :class:`StorageError`.
    """
    storage = LocalStorage(base)
    storage.make_folder("")
    number = 1 + max((n for name in storage.names("") if (n := parse_run(name)) is not None), default=0)
    while not storage.claim_folder(run_name(number)):
        number += 1
    return f"{storage.root}/{run_name(number)}"


def find_run(base: str | os.PathLike[str], which: int | str) -> Run:
    """The run of that number; for ``latest``, the one with the highest.

    Raises :class:`CheckpointNotFound` saying which there are, and :class:`UsageError` for anything else.
    """
    storage = LocalStorage(base)
    numbers = _numbers(storage)
    if which != "latest" and type(which) is not int:
        raise UsageError(f"{which!r} names no run; give its number, or 'latest'")
    number = which if isinstance(which, int) else max(numbers, default=0)
    if number in numbers:
        return _describe(f"{storage.root}/{run_name(number)}", number)
    if not numbers:
        raise CheckpointNotFound(f"there are no runs in {storage.root}. Start one first, or check the path")
    shown = numbers if len(numbers) <= 8 else [*numbers[:2], "…", *numbers[-5:]]
    raise CheckpointNotFound(f"there is no run {number} in {storage.root}; it has {', '.join(map(str, shown))}. Name one of them, or 'latest'")


def _numbers(storage: Storage) -> list[int]:
    found = [(number, name) for name in storage.names("") if (number := parse_run(name)) is not None]
    return sorted(number for number, name in found if os.path.isdir(f"{storage.root}/{name}"))


def _describe(path: str, number: int | None) -> Run:
    storage = LocalStorage(path)
    try:
        known, told = read_run_file(storage), _from_steps(storage)
    except EngineError as e:
        logger.warning("run %s is listed without its checkpoints: %s", path if number is None else number, e)
        return Run(number, path)
    experiment, created = known.get("experiment_name"), _seconds(known.get("created"))
    if created is not None:
        told["created"] = created
    return Run(number, path, experiment if isinstance(experiment, str) else "", **told)


def _from_steps(storage: Storage) -> dict[str, Any]:
    """Fields of a :class:`Run`, as far as its steps tell them."""
    on_disk = {step.number for step in steps(storage)}
    told: dict[str, Any] = {"steps": len(on_disk), "saves": len(on_disk)}
    try:
        found, line = current_line(storage)
    except (CheckpointNotFound, CheckpointCorrupt):  # none yet, deleted meanwhile, or none that can be read
        return told
    name, head = line[-1]
    past = _past(storage, name)
    told |= {"created": min(s.created for _, s in found), "saves": len(on_disk | past.saved()), "monitor": head.monitor}
    if head.monitor and past.best is not None:
        told |= {"best": past.best.value, "best_step": past.best.step}
    elif order := ranked(line, head.monitor, head.mode):
        told |= {"best": order[0][1].metrics[head.monitor], "best_step": order[0][1].step}
    return told


class _Best(Struct):
    value: float
    step: int


class _Past(Struct):
    """Of the progress in a step's record, what outlives the steps."""

    history: list[dict[str, float]] = []
    best: _Best | None = None

    def saved(self) -> set[int]:
        return {int(entry["step"]) for entry in self.history if math.isfinite(entry.get("step", math.nan))}


def _past(storage: Storage, folder: str) -> _Past:
    try:
        return msgspec.convert(decode_record(read_manifest(storage, folder).record)["progress"], _Past)
    except (EngineError, KeyError, TypeError, msgspec.ValidationError):  # damaged, deleted meanwhile, or not a training run's
        return _Past()


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
