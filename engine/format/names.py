"""Names: of steps and pointers in a run, of what is hidden there, and of runs below a base folder."""

import os
import re
from typing import Literal, NamedTuple

from engine.storage.base import REMOVED, REPLACED

LATEST = "latest"
BEST = "best"
RUN_FILE = "run.json"
METADATA = "__metadata__"
MAX_NAME_CHARACTERS = 1 << 16
_STEP = re.compile(r"step_(\d{8,18})")
_LEASE = re.compile(r"\.lease_(\d{8,18})")
_FENCED = re.compile(r"\.fenced_[0-9a-f]{16}")
_HIDDEN = re.compile(rf"((step_\d{{8,18}})\.[0-9a-f]{{4,12}})({re.escape(REPLACED)}|{re.escape(REMOVED)})?")
_RUN = re.compile(r"run_(\d{3,9})")


class Hidden(NamedTuple):
    """What a folder below a lease's is: the step it would be or was, the name of the attempt it belongs to, and its state.

    ``attempt``: a save that has not committed, or what it replaced, exchanged for it. ``replaced``: a whole step, aside while a
    new one takes its place. ``removed``: a step that is being deleted, perhaps in part.
    """

    step: str
    attempt: str
    state: Literal["attempt", "replaced", "removed"]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The number in a step folder's name; None for any other name, also for ``step_5``, which is not how steps are written."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def is_misplaced(folder: str, step: int) -> bool:
    """Whether a folder that is named as a step's is not that of ``step``: renamed, or a copy. It would be taken for what its name says."""
    return parse_step(folder) not in (None, step)


def lease_name(token: int) -> str:
    return f".lease_{token:08d}"


def parse_lease(name: str) -> int | None:
    """The token in the name of a lease's folder; None for any other name."""
    found = _LEASE.fullmatch(name)
    return int(found[1]) if found and lease_name(int(found[1])) == name else None


def fenced_name() -> str:
    """A new name for the folder of a lease that is lost."""
    return f".fenced_{os.urandom(8).hex()}"


def is_fenced(name: str) -> bool:
    return _FENCED.fullmatch(name) is not None


def attempt_name(lease: str, step: str, number: int) -> str:
    """The hidden folder of the save ``number`` of a lease, which may become ``step``: alike on all ranks."""
    return f"{lease}/{step}.{number:04x}"


def attempt_order(attempt: str) -> tuple[int, int] | None:
    """By which attempts are in the order in which they were begun, whatever the clocks said. None for any other name."""
    lease, _, name = attempt.partition("/")
    token, hidden = parse_lease(lease), parse_hidden(name)
    return (token, int(name.rpartition(".")[2], 16)) if token is not None and hidden is not None and hidden.state == "attempt" else None


def removed_name(lease: str, step: str) -> str:
    """A new name for a step that is being removed."""
    return f"{lease}/{step}.{os.urandom(6).hex()}{REMOVED}"


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
