"""Who may save into a run: the job that took it last. An orphan of a job that was started anew cannot commit.

The lease is a file. Taking it also removes what others have begun, so that nothing they commit can be complete: whoever began before
that has lost its folder, whoever begins after it sees the new lease before it commits.
"""

import json
import os
import socket
import time

from engine.catalog.removal import sweep
from engine.errors import StorageError
from engine.format.names import LEASE
from engine.storage import Storage
from engine.transfer.runfile import read_object


def take(storage: Storage, holder: str) -> None:
    """Called once a job, by rank 0, before its first save begins to write. ``holder``: see :func:`~engine.format.names.new_holder`."""
    storage.make_folder("")
    told = {"holder": holder, "host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    storage.point(LEASE, json.dumps(told) + "\n")
    sweep(storage, holder)


def check(storage: Storage, holder: str) -> None:
    """Called by rank 0 right before a commit. Raises :class:`StorageError` where another job has taken the run."""
    found = read_object(storage, LEASE)
    if found.get("holder") != holder:
        who = ", ".join(f"{name} {found[name]}" for name in ("host", "process", "since") if name in found) or "nobody"
        raise StorageError(
            f"{storage.root} belongs to another job now ({who}): this one may no longer save into it, and nothing of it was committed. Two jobs "
            "must not share a run's folder"
        )
