"""A save without training or torch in it: the real commit, files with known bytes, and a look at what is in view afterwards."""

from msgspec.structs import replace

from engine.catalog import read_manifest
from engine.catalog.lease import HOLDER, take
from engine.format.manifest import Summary
from engine.format.names import attempt_name, is_fenced, parse_lease, parse_step, step_name
from engine.format.record import decode_record
from engine.storage import Storage
from engine.transfer.commit import commit_attempt
from engine.transfer.write import write_whole
from tests.catalog.made import manifest

FILES = ("rank_00000.0.safetensors", "rank_00000.index")


def begin(storage: Storage, step: int, lease: str = "", number: int = 1) -> str:
    """An attempt's folder; its name. ``lease``: of the job that saves; without one, the run is taken."""
    attempt = attempt_name(lease or take(storage), step_name(step), number)
    storage.claim_folder(attempt)
    return attempt


def save(storage: Storage, of: Summary, uid: int, lease: str = "") -> Summary:
    """As a Checkpointer does: an attempt, the ranks' files, the commit. ``uid`` is in every file, and the number of the save."""
    attempt = begin(storage, of.step, lease, uid)
    of = replace(of, attempt=attempt)
    for name in FILES:
        write_whole(storage, f"{attempt}/{name}", _content(name, uid))
    storage.sync_folder(attempt)
    commit_attempt(storage, attempt, manifest(of, {"uid": uid}))
    return of


def _content(name: str, uid: int) -> bytes:
    return f"{name} of save {uid}\n".encode() * 3


def uid_in(storage: Storage, folder: str) -> int:
    """Which save a folder holds. Every file of it has to be there, whole, and of that save."""
    uid = decode_record(read_manifest(storage, folder).record)["uid"]
    assert sorted(storage.names(folder)) == sorted([*FILES, "manifest"]), folder
    for name in FILES:
        assert storage.read(f"{folder}/{name}", 1000) == _content(name, uid), f"{folder}/{name}"
    return uid


def in_view(storage: Storage) -> dict[int, int]:
    """Of every visible step, its number and the save that it holds."""
    numbers = {name: number for name in storage.names("") if (number := parse_step(name)) is not None}
    return {number: uid_in(storage, name) for name, number in numbers.items()}


def hidden(storage: Storage) -> list[str]:
    """What jobs have left, but for the lease of the one that has the run."""
    folders = sorted(name for name in storage.names("") if is_fenced(name) or parse_lease(name) is not None)
    return [f"{folder}/{name}" for folder in folders for name in sorted(storage.names(folder)) if name != HOLDER]


def pointer(storage: Storage, name: str = "latest") -> str:
    return storage.read(name, 100).decode().strip() if storage.exists(name) else ""
