"""After a failure: whether an attempt became a step."""

import contextlib

from engine.catalog.listing import read_summary
from engine.catalog.removal import discard, restore
from engine.errors import CheckpointCorrupt
from engine.format.names import parse_hidden, removed_name
from engine.storage import Storage
from engine.transfer.commit import point_latest


def settle(storage: Storage, attempt: str) -> bool:
    """Make sure that ``attempt`` is a step, to which ``latest`` points, or can never become one; returns whether it is.

    Whoever was about to commit it may still be at it: of its rename and the one that hides the attempt here, one succeeds. Called on
    rank 0 of the job that made the attempt. Raises :class:`StorageError` where that cannot be found out.
    """
    lease, _, name = attempt.partition("/")
    hidden = parse_hidden(name)
    assert hidden is not None
    with contextlib.suppress(FileNotFoundError):  # committed at this moment, or fenced off
        discard(storage, attempt, removed_name(lease, hidden.step))
    restore(storage, [lease])
    try:
        is_step = read_summary(storage, hidden.step).attempt == attempt
    except CheckpointCorrupt:  # not there
        return False
    if is_step:
        point_latest(storage, hidden.step, attempt)
    return is_step
