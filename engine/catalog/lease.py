"""Who may change a run: the job that took it last.

A lease is a folder of the run, numbered by a token that only grows. All that its job does to the run is a rename out of that folder or
into it: a commit, a pointer that moves, a step that is deleted. Taking the run makes the folder of the next token, renames those of
earlier jobs away, and removes what is in them, name by name, until they are gone. So each act of an earlier job either comes before
the run is taken, and is seen, or finds no folder, and fails; there is no check that an act could come too late after. See docs/lease.md.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator

from engine.catalog.listing import summaries
from engine.catalog.removal import sweep
from engine.errors import StorageError
from engine.format.names import attempt_order, fenced_name, lease_name, parse_lease
from engine.storage import Storage
from engine.transfer.runfile import read_object
from engine.transfer.write import write_whole

HOLDER = "holder.json"


def take(storage: Storage) -> str:
    """Take the run and return the lease's name. Called once per job, on rank 0, before it looks for a step to resume or, where it
    resumes none, before its first save.

    Clears up after the jobs before. Raises :class:`StorageError` where the medium refuses, or a different job takes the run at the
    same time, and later.
    """
    storage.make_folder("")
    lease = _claim(storage)
    with held(storage, lease):
        who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_whole(storage, f"{lease}/{HOLDER}", json.dumps(who).encode() + b"\n")
    for token in _tokens(storage):
        if token < _token(lease):
            with contextlib.suppress(FileNotFoundError):  # a different job takes the run too
                storage.rename(lease_name(token), fenced_name())
    sweep(storage)
    if not storage.exists(lease):
        raise _loss(storage, lease)
    return lease


def _claim(storage: Storage) -> str:
    """Make the folder of a token that is the highest. A slow job may claim one that was taken and is gone: that one is not."""
    while True:
        known = _tokens(storage) or [(attempt_order(s.attempt) or (0, 0))[0] for _, s in summaries(storage)]  # a run that was copied
        lease = lease_name(1 + max(known, default=0))
        if storage.claim_folder(lease):
            if lease == lease_name(max(_tokens(storage), default=0)):
                return lease
            storage.drop_folder(lease)


def _tokens(storage: Storage) -> list[int]:
    return [token for name in storage.names("") if (token := parse_lease(name)) is not None]


def _token(lease: str) -> int:
    token = parse_lease(lease)
    assert token is not None
    return token


@contextlib.contextmanager
def held(storage: Storage, lease: str) -> Iterator[None]:
    """What fails in this block because the lease is lost is a :class:`StorageError` that says who has the run now."""
    try:
        yield
    except (StorageError, FileNotFoundError) as e:
        if storage.exists(lease):
            raise
        raise _loss(storage, lease) from e


def _loss(storage: Storage, lease: str) -> StorageError:
    if not storage.exists(""):
        return StorageError(
            f"the run's folder {storage.root} is gone: it was moved or deleted while this job saves into it. Nothing more can be saved there; "
            "move it back and restart the job"
        )
    later = max(_tokens(storage), default=0)
    if later <= _token(lease):
        return StorageError(
            f"{storage.root}/{lease}, this job's lease of the run, is gone, and no other job has taken the run: it was deleted, or the folder is "
            "a copy. Restart the job to save into it"
        )
    found = read_object(storage, f"{lease_name(later)}/{HOLDER}")
    who = ", ".join(f"{name} {found[name]}" for name in ("host", "process", "since") if name in found) or f"lease {later}"
    return StorageError(
        f"{storage.root} belongs to another job now ({who}): this one may no longer save into it. One that only reads a run, to evaluate it, "
        "gives read_only=True to its Checkpointer; two that save need two folders"
    )
