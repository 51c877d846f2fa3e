"""``RUN``, ``RUN@step`` or the path of a step, to a committed step."""

import os

from engine.catalog import find
from engine.format.manifest import MANIFEST
from engine.format.names import LATEST
from engine.storage import LocalStorage, Storage

HELP = "a run's folder, RUN@latest, RUN@best, RUN@step:N (or RUN@N), RUN@epoch:N, or a step's folder; a run alone means its latest step"


def locate(target: str) -> tuple[Storage, str]:
    """The storage and folder. Raises what :func:`engine.catalog.find` does."""
    run, at, what = target.rpartition("@")
    if not at or os.path.exists(target):  # a path may have an @ of its own
        run, what = target, LATEST
    path = os.path.abspath(run)
    if what == LATEST and os.path.lexists(os.path.join(path, MANIFEST)):
        return LocalStorage(os.path.dirname(path)), os.path.basename(path)
    return find(run, f"step:{what}" if what.isdecimal() else what)
