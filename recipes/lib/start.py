"""Where a run begins: afresh, or from a checkpoint; and what there is where none fits. Meant for rank 0, which tells the others."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import catalog
from engine.catalog.settings import stored_config
from engine.cli.ls import list_steps_or_runs
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, IncompatibleCheckpoint, UsageError
from engine.format.names import parse_step, step_name
from engine.storage import LocalStorage

AUTO = "auto"
SPECS = "latest, best, auto (the latest, or a fresh start where there is none), epoch:N, step:N, or the folder of a step or run"
_MAX_NEIGHBOURS = 20


@dataclass(frozen=True)
class Start:
    """The folder that a run writes to, and the one of the step that it resumes from, if it does."""

    run_dir: Path
    step: Path | None = None


def what_to_resume(args: argparse.Namespace, own: Path) -> tuple[Path, str]:
    """Of the flags ``--resume``, ``--resume_from`` and ``--resume_epoch``: the run's folder, ``own`` unless they name another, and which
    of its steps; which is empty for a fresh start. Raises :class:`UsageError` where they contradict each other."""
    what, folder = args.resume or "", args.resume_from
    if what and args.resume_epoch:
        raise UsageError("--resume and --resume_epoch both say which checkpoint: give one of them")
    is_path = bool(what) and what not in ("latest", "best", AUTO) and not what.startswith(("epoch:", "step:"))
    if folder and (is_path or what == AUTO):
        raise UsageError(f"--resume {what} says where to look, and so does --resume_from: give one of them")
    if is_path:
        path = Path(what)
        return (path if path.is_dir() and parse_step(path.name) is None else path.absolute().parent), what
    return folder or own, f"epoch:{args.resume_epoch}" if args.resume_epoch else what or ("latest" if folder else "")


def find_step(run_dir: Path, what: str, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the step that ``what`` names, and the settings it was saved with. None for ``auto`` where there is no step.

    Fails fast: a name in the run's folder that is no step's, or a step without its manifest, is an error and is not passed over.
    """
    with telling_what_is_there(run_dir, say):
        try:
            storage, folder = catalog.find(run_dir, "latest" if what == AUTO else what, names="refuse")
        except CheckpointNotFound as e:
            if what != AUTO:
                raise
            say(f"starting fresh: {e}")
            return None
        return Path(storage.root, folder), stored_config(storage, folder)


@contextmanager
def telling_what_is_there(run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Where a checkpoint is missing or damaged, say which there are before the error goes on."""
    try:
        yield
    except (CheckpointNotFound, CheckpointCorrupt):
        with suppress(EngineError, OSError):  # the first error is what counts
            for line in what_is_there(run_dir):
                say(line)
        raise


def what_is_there(folder: Path) -> list[str]:
    """The checkpoints in a folder, by number, and what else lies there; or else the runs below or beside it."""
    steps = [step.name for step in catalog.steps(LocalStorage(folder))]
    if steps:
        others = sorted(path.name for path in folder.iterdir() if path.name not in steps)
        return [f"checkpoints in {folder}:", *list_steps_or_runs(str(folder)), f"besides them: {', '.join(others) or 'nothing'}"]
    found = [f"no checkpoints in {folder}"]
    for near in (folder, folder.absolute().parent):
        runs = sorted(path.name for path in near.iterdir() if path.is_dir() and catalog.steps(LocalStorage(path))) if near.is_dir() else []
        if runs:
            more = f" and {len(runs) - _MAX_NEIGHBOURS} more" if len(runs) > _MAX_NEIGHBOURS else ""
            found.append(f"runs with checkpoints in {near}: {', '.join(runs[:_MAX_NEIGHBOURS])}{more}")
    return found


def refuse_other_networks(names: tuple[str, ...], now: dict[str, Any], before: dict[str, Any]) -> None:
    """Of the settings ``names``, all must be as the checkpoint has them. Raises :class:`IncompatibleCheckpoint`, before anything is made."""
    differing = [f"--{name} is {now[name]}, the checkpoint has {before[name]}" for name in names if name in before and now[name] != before[name]]
    if differing:
        raise IncompatibleCheckpoint(f"the networks differ from the checkpoint's: {'; '.join(differing)}. Leave these out, or start a new run")


def refuse_to_overwrite(run_dir: Path) -> None:
    """A run that starts anew would replace, step by step, what another has saved there. Raises :class:`UsageError`."""
    steps = catalog.steps(LocalStorage(run_dir))
    if steps:
        raise UsageError(
            f"{run_dir} has {len(steps)} checkpoints of an earlier run, the last of them {steps[-1].name}, which this one would overwrite. "
            "Go on there with --resume latest, or name another folder"
        )


def keep_config(config: Path, run_dir: Path, step: int) -> None:
    """A copy beside the checkpoints: ``config.yaml``, and where a resume is given another one, ``config_step_….yaml``."""
    given, kept = config.read_bytes(), run_dir / "config.yaml"
    run_dir.mkdir(parents=True, exist_ok=True)
    if kept.exists() and kept.read_bytes() != given:
        kept = run_dir / f"config_{step_name(step)}.yaml"
    kept.write_bytes(given)
