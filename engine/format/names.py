"""Names of folders and pointers in a run."""

import re

LATEST = "latest"
RUN_FILE = "run.json"
_STEP = re.compile(r"step_(\d{8,18})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """The number in a step folder's name; None for any other name, also for ``step_5``, which is not how steps are written."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None
