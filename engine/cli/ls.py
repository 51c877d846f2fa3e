"""``engine ls``: the steps of a run, or the runs below a folder. From the heads of manifests alone."""

import os

from engine.catalog import Run, Step, descends_from, find, read_summary, runs_below, steps
from engine.cli.text import megabytes, moment, numbers, table
from engine.errors import CheckpointNotFound, EngineError
from engine.format.manifest import Summary
from engine.format.names import BEST, LATEST
from engine.storage import LocalStorage, Storage


def list_steps_or_runs(path: str) -> list[str]:
    """The lines to print. Raises :class:`CheckpointNotFound` where there is neither."""
    storage = LocalStorage(path)
    found = steps(storage)
    if found:
        return _steps(storage, found)
    below = runs_below(path)
    if not below:
        raise CheckpointNotFound(f"there is no committed step in {storage.root}, and no run below it; check the path")
    return _runs(storage.root, below)


def _steps(storage: Storage, found: list[Step]) -> list[str]:
    heads: dict[str, Summary] = {}
    told: dict[str, str] = {}
    for step in found:
        try:
            heads[step.name] = read_summary(storage, step.name)
        except EngineError as e:
            told[step.name] = f"cannot be read: {e}"
    marks = _marks(storage, heads)
    rows = [_row(step.name, heads[step.name], marks[step.name]) for step in found if step.name in heads]
    lines = table(["step", ">epoch", ">ranks", "engine", "saved (UTC)", ">MB", "metrics"], rows)
    listed = iter(lines[1:])
    return [lines[0], *(f"{step.name}  {told[step.name]}" if step.name in told else next(listed) for step in found)]


def _row(name: str, head: Summary, mark: str) -> list[str]:
    cells = [name, str(head.epoch), str(head.world_size), head.engine, moment(head.created), megabytes(head.size_bytes)]
    return [*cells, "  ".join(part for part in (numbers(head.metrics), mark) if part)]


def _marks(storage: Storage, heads: dict[str, Summary]) -> dict[str, str]:
    """Which is the latest, which the best, and which were left for another line of training."""
    latest = _named(storage, LATEST)
    present = heads.get(latest)
    best = _named(storage, BEST) if present and present.best_step >= 0 else ""
    marks = {}
    for name, head in heads.items():
        parts = [mark for mark, named in (("latest", latest), (f"best {head.monitor}".rstrip(), best)) if name == named]
        if present and not descends_from(present, head):
            parts.append("other line")
        marks[name] = f"← {', '.join(parts)}" if parts else ""
    return marks


def _named(storage: Storage, pointer: str) -> str:
    try:
        return find(storage.root, pointer)[1]
    except EngineError:
        return ""


def _runs(root: str, below: list[Run]) -> list[str]:
    rows = []
    for run in below:
        created = "" if run.created is None else moment(run.created)
        best = "" if run.best is None else f"{run.monitor}={run.best:.4g} at step {run.best_step}"
        rows.append([os.path.relpath(run.path, root), run.experiment, created, str(run.steps), str(run.saves), best])
    return table(["run", "experiment", "begun (UTC)", ">steps", ">saves", "best"], rows)
