"""``engine verify``: every byte of a step against what the step says of itself."""

from engine.catalog import read_summary
from engine.cli.target import locate
from engine.cli.text import Bar, megabytes, say
from engine.errors import CheckpointCorrupt, EngineError
from engine.format.names import parse_step
from engine.storage import LocalStorage, Storage
from engine.transfer.verify import verify


def verify_steps(target: str, everything: bool) -> int:
    """Prints what is wrong, and returns the exit code. ``everything``: all steps of the run ``target``."""
    storage, folders = _all_steps(target) if everything else _one_step(target)
    problems = sum(_verify(storage, folder) for folder in folders)
    return CheckpointCorrupt.exit_code if problems else 0


def _one_step(target: str) -> tuple[Storage, list[str]]:
    storage, folder = locate(target)
    return storage, [folder]


def _all_steps(target: str) -> tuple[Storage, list[str]]:
    """Also folders called steps that have lost their manifest, which no listing shows."""
    storage = LocalStorage(target)
    folders = sorted((name for name in storage.names("") if parse_step(name) is not None), key=lambda name: parse_step(name) or 0)
    return (storage, folders) if folders else _one_step(target)


def _verify(storage: Storage, folder: str) -> int:
    try:
        total_bytes = read_summary(storage, folder).size_bytes
    except EngineError:
        total_bytes = 0
    bar = Bar(total_bytes)
    try:
        problems = verify(storage, folder, bar.add)
    finally:
        seconds = bar.close()
    for problem in problems:
        say(f"{folder}/{problem}", error=True)
    result = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "sound"
    speed = bar.done_bytes / 1e9 / max(seconds, 1e-9)
    say(f"{folder}: {result}; {megabytes(bar.done_bytes)} MB read in {seconds:.2f} s ({speed:.2f} GB/s)")
    return len(problems)
