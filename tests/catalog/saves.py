"""A save without training or torch in it: the real commit, files with known bytes, and a look at what is in view afterwards."""

import os
from pathlib import Path

from engine.catalog import read_manifest
from engine.format.manifest import Summary
from engine.format.names import attempt_name, parse_step, step_name
from engine.format.record import decode_record
from engine.storage import LocalStorage
from engine.transfer.commit import commit_attempt
from engine.transfer.write import write_whole
from tests.catalog.made import manifest

FILES = ("rank_00000.0.safetensors", "rank_00000.index")


def begin(storage: LocalStorage, step: int) -> str:
    """An attempt's folder; its name."""
    attempt = attempt_name(step_name(step))
    storage.make_folder(attempt)
    return attempt


def save(storage: LocalStorage, of: Summary, uid: int) -> None:
    """As a Checkpointer does: an attempt, the ranks' files, the commit. ``uid`` is in every file."""
    attempt = begin(storage, of.step)
    for name in FILES:
        write_whole(storage, f"{attempt}/{name}", _content(name, uid))
    storage.sync_folder(attempt)
    commit_attempt(storage, attempt, manifest(of, {"uid": uid}))


def _content(name: str, uid: int) -> bytes:
    return f"{name} of save {uid}\n".encode() * 3


def uid_in(storage: LocalStorage, folder: str) -> int:
    """Which save a folder holds. Every file of it has to be there, whole, and of that save."""
    uid = decode_record(read_manifest(storage, folder).record)["uid"]
    assert sorted(storage.names(folder)) == sorted([*FILES, "manifest"]), folder
    for name in FILES:
        assert Path(storage.path(folder), name).read_bytes() == _content(name, uid), f"{folder}/{name}"
    return uid


def in_view(storage: LocalStorage) -> dict[int, int]:
    """Of every visible step, its number and the save that it holds."""
    numbers = {name: number for name in storage.names("") if (number := parse_step(name)) is not None}
    return {number: uid_in(storage, name) for name, number in numbers.items()}


def hidden(storage: LocalStorage) -> list[str]:
    return sorted(name for name in storage.names("") if name.startswith(".step_"))


def pointer(storage: LocalStorage, name: str = "latest") -> str:
    return Path(storage.path(name)).read_text().strip() if os.path.exists(storage.path(name)) else ""
