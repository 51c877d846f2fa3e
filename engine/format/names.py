"""Names: of steps and pointers in a run, of what is hidden there, and of runs below a base folder."""

import os
import re
from typing import Literal, NamedTuple

from engine.storage.base import REMOVED, REPLACED

LATEST = "latest"
BEST = "best"
RUN_FILE = "run.json"
LEASE = ".lease"
METADATA = "__metadata__"
MAX_NAME_CHARACTERS = 1 << 16
_STEP = re.compile(r"step_(\d{8,18})")
_HIDDEN = re.compile(rf"(\.(step_\d{{8,18}})\.[0-9a-f]{{12}})({re.escape(REPLACED)}|{re.escape(REMOVED)})?")
_RUN = re.compile(r"run_(\d{3,9})")


class Hidden(NamedTuple):
    """What a hidden folder is: the step it would be or was, the attempt it belongs to, and its state.

    ``attempt``: a save that has not committed, or what it replaced, exchanged for it. ``replaced``: a whole step, aside while a
    new one takes its place. ``removed``: a step that is being deleted, perhaps in part.
    """

    step: str
    attempt: str
    state: Literal["attempt", "replaced", "removed"]

    def is_of(self, holder: str) -> bool:
        return bool(holder) and self.attempt.rpartition(".")[2].startswith(holder)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The number in a step folder's name; None for any other name, also for ``step_5``, which is not how steps are written."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def new_holder() -> str:
    """A name for a job that saves into a run: eight hexadecimal digits, which the names of its attempts begin with."""
    return os.urandom(4).hex()


def attempt_name(step: str, holder: str = "", number: int = 0) -> str:
    """A hidden name for the step folder ``step``: of ``holder``'s save ``number``, alike on all its ranks; without one, a new name."""
    return f".{step}.{holder}{number & 0xFFFF:04x}" if holder else f".{step}.{os.urandom(6).hex()}"


def parse_hidden(name: str) -> Hidden | None:
    """None for any name that is not ours."""
    found = _HIDDEN.fullmatch(name)
    if found is None or parse_step(found[2]) is None:
        return None
    state = "attempt" if found[3] is None else "replaced" if found[3] == REPLACED else "removed"
    return Hidden(found[2], found[1], state)


def name_problem(tensor: str) -> str:
    """Why no tensor may have this name; empty where it may. The JSON of a shard file or of an export has names as its keys."""
    if not tensor or len(tensor) > MAX_NAME_CHARACTERS:
        return f"which is not of 1 to {MAX_NAME_CHARACTERS} characters"
    if tensor.rpartition(".")[2] == METADATA:
        return f"and {METADATA} is what safetensors calls the metadata of a file"
    return ""


def run_name(number: int) -> str:
    return f"run_{number:03d}"


def parse_run(name: str) -> int | None:
    """The number in a run folder's name; None for any other name."""
    found = _RUN.fullmatch(name)
    return int(found[1]) if found and run_name(int(found[1])) == name else None
