"""The ``engine`` command. It reads catalogues and manifests only, so it never imports torch."""

import argparse
import sys
import time

from engine.catalog import steps
from engine.catalog.resolve import read_manifest
from engine.errors import CheckpointNotFound, EngineError
from engine.format.names import LATEST
from engine.storage import LocalStorage


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine", description="Look at lockstep checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("ls", help="the committed steps of a run")
    listing.add_argument("run", help="the run's folder")
    args = parser.parse_args(arguments)
    try:
        _list(args.run)
    except EngineError as e:
        print(f"engine {args.command}: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _list(run: str) -> None:
    storage = LocalStorage(run)
    found = steps(storage)
    if not found:
        raise CheckpointNotFound(f"there is no committed step in {storage.root}")
    pointer = storage.read(LATEST, 4096).decode(errors="replace").strip() if storage.exists(LATEST) else ""
    print(f"{'step':16}{'epoch':>6}{'ranks':>6}  {'engine':14}{'saved (UTC)':21}metrics")
    for step in found:
        try:
            m = read_manifest(storage, step.name)
        except EngineError as e:
            print(f"{step.name:16}cannot be read: {e}")
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m.created))
        metrics = " ".join(f"{name}={value:.4g}" for name, value in m.metrics.items())
        mark = "  ← latest" if step.name == pointer else ""
        print(f"{step.name:16}{m.epoch:>6}{m.world_size:>6}  {m.engine:14}{saved:21}{metrics}{mark}")


if __name__ == "__main__":
    sys.exit(main())
