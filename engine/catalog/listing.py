"""The steps that a run has, and what their manifests say in the head. Anything may vanish between a listing and a read."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import TypeVar

from msgspec import Struct

from engine.errors import CheckpointCorrupt, EngineError
from engine.format import manifest
from engine.format.manifest import MANIFEST, Manifest, Summary
from engine.format.names import is_misplaced, parse_step
from engine.storage import Reader, Storage

logger = logging.getLogger("engine")
T = TypeVar("T")


class Step(Struct, frozen=True):
    """A committed step: its folder's name below the run, and its number."""

    name: str
    number: int


def steps(storage: Storage) -> list[Step]:
    """The run's committed steps, by number. Hidden attempts, and folders without a manifest, are none."""
    found = [Step(name, number) for name in storage.names("") if (number := parse_step(name)) is not None]
    return sorted((s for s in found if storage.exists(f"{s.name}/{MANIFEST}")), key=lambda s: s.number)


def read_summary(storage: Storage, folder: str) -> Summary:
    """Return the head of a step's manifest, checksummed. Raises :class:`CheckpointCorrupt`, also where it is a different step's."""
    return _named(storage, folder, _read(storage, folder, manifest.read_summary))


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """Return a step's whole manifest, checksummed. Raises :class:`CheckpointCorrupt`, also where it is a different step's."""
    found = _read(storage, folder, manifest.read_manifest)[0]
    _named(storage, folder, found.summary)
    return found


def _named(storage: Storage, folder: str, summary: Summary) -> Summary:
    """A folder that was renamed, or copied over, would be taken for the step of that number."""
    if is_misplaced(folder, summary.step):
        raise CheckpointCorrupt(f"{storage.root}/{folder} holds step {summary.step}: it has been renamed or is a copy. Name it back, or remove it")
    return summary


def _read(storage: Storage, folder: str, decode: Callable[[Reader, str], T]) -> T:
    path = f"{folder}/{MANIFEST}"
    try:
        with closing(storage.open(path)) as reader:
            return decode(reader, f"{storage.root}/{path}")
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{storage.root}/{path} is missing") from None


def summaries(storage: Storage, names: Iterable[str] | None = None) -> list[tuple[str, Summary]]:
    """Of the run's steps, or of those named, by number. Those that cannot be read are passed over with a warning; those that are
    gone, without."""
    found = []
    for name in [step.name for step in steps(storage)] if names is None else names:
        try:
            summary = read_summary(storage, name)
        except EngineError as e:
            if storage.exists(f"{name}/{MANIFEST}"):
                logger.warning("%s is passed over: %s", name, e)
            continue
        found.append((name, summary))
    return sorted(found, key=lambda named: named[1].step)


def absent(what: str, storage: Storage) -> str:
    """The message that ``what`` is not there, with what there is instead."""
    have = [step.name for step in steps(storage)]
    if have:
        shown = have if len(have) <= 6 else [*have[:2], "…", *have[-3:]]
        return f"{what} in {storage.root}; it has {', '.join(shown)}. Name one of them (step:N), or 'latest'"
    if not os.path.isdir(storage.root):
        return f"{what}: the run folder {storage.root} does not exist. Check the path; relative ones start at {os.getcwd()}"
    return f"{what} in {storage.root}: no step has been committed there. Start the run without --resume, or check the path"
