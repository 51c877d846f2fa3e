"""``latest``, ``epoch:N``, ``step:N`` or a path, to a committed step. Torch-free: the command line starts in an instant."""

import logging
import os

from msgspec import Struct

from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, UsageError
from engine.format.manifest import MANIFEST, MAX_ENVELOPE_BYTES, Manifest, decode
from engine.format.names import LATEST, parse_step
from engine.storage import LocalStorage, Storage

logger = logging.getLogger("engine")
_MAX_POINTER_BYTES = 4096


class Step(Struct, frozen=True):
    """A committed step: its folder's name below the run, and its number."""

    name: str
    number: int


def steps(storage: Storage) -> list[Step]:
    """The run's committed steps, by number. Hidden attempts, and folders without a manifest, are none."""
    found = [Step(name, number) for name in storage.names("") if (number := parse_step(name)) is not None]
    return sorted((s for s in found if storage.exists(f"{s.name}/{MANIFEST}")), key=lambda s: s.number)


def find(run: str | os.PathLike[str], what: str) -> tuple[Storage, str]:
    """The storage and folder of the step that ``what`` names in ``run``.

    ``latest``, ``epoch:N`` (the last step of N completed epochs), ``step:N``, or a path to a step's folder or to another run
    (its latest). Raises :class:`CheckpointNotFound` saying what there is instead.
    """
    storage = LocalStorage(run)
    kind, _, number = what.partition(":")
    if what == LATEST:
        return storage, _latest(storage)
    if kind in ("epoch", "step"):
        if not number.isdecimal():
            raise UsageError(f"'{what}' names no checkpoint: after '{kind}:' comes a whole number, as in '{kind}:3'")
        return storage, (_by_step if kind == "step" else _by_epoch)(storage, int(number))
    path = os.path.abspath(what)
    if os.path.lexists(os.path.join(path, MANIFEST)):
        return LocalStorage(os.path.dirname(path)), os.path.basename(path)
    other = LocalStorage(path)
    if steps(other):
        return other, _latest(other)
    raise CheckpointNotFound(
        _nothing(f"'{what}' is neither a step nor a run with steps" if os.path.isdir(path) else f"there is no folder {path}", storage)
    )


def _latest(storage: Storage) -> str:
    """What the pointer names; the highest step, with a warning, where the pointer is lost or names a removed step."""
    found = steps(storage)
    if not found:
        raise CheckpointNotFound(_nothing("there is no checkpoint", storage))
    try:
        name = storage.read(LATEST, _MAX_POINTER_BYTES).decode(errors="replace").strip()
    except (FileNotFoundError, CheckpointCorrupt):  # a pointer is a convenience: nothing depends on a sound one
        name = ""
    if any(step.name == name for step in found):
        return name
    problem = f"names {name!r}, which is gone" if name else "is missing or unreadable"
    logger.warning("%s/%s %s; taking %s, the highest step", storage.root, LATEST, problem, found[-1].name)
    return found[-1].name


def _by_step(storage: Storage, number: int) -> str:
    for step in steps(storage):
        if step.number == number:
            return step.name
    raise CheckpointNotFound(_nothing(f"there is no step {number}", storage))


def _by_epoch(storage: Storage, number: int) -> str:
    for step in reversed(steps(storage)):
        if _epoch_of(storage, step) == number:
            return step.name
    raise CheckpointNotFound(_nothing(f"no checkpoint was saved after {number} completed epochs", storage))


def _epoch_of(storage: Storage, step: Step) -> int | None:
    try:
        return read_manifest(storage, step.name).epoch
    except (EngineError, FileNotFoundError) as e:
        logger.warning("%s is passed over: %s", step.name, e)
        return None


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest alone, checksummed. Raises :class:`CheckpointCorrupt`."""
    path = f"{folder}/{MANIFEST}"
    try:
        return decode(storage.read(path, MAX_ENVELOPE_BYTES), Manifest, f"{storage.root}/{path}")
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{storage.root}/{path} is missing") from None


def _nothing(what: str, storage: Storage) -> str:
    have = [step.name for step in steps(storage)]
    if have:
        shown = have if len(have) <= 6 else [*have[:2], "…", *have[-3:]]
        return f"{what} in {storage.root}; it has {', '.join(shown)}. Name one of them (step:N), or 'latest'"
    if not os.path.isdir(storage.root):
        return f"{what}: the run folder {storage.root} does not exist. Check the path; relative ones start at {os.getcwd()}"
    return f"{what} in {storage.root}: no step has been committed there. Start the run without --resume, or check the path"
