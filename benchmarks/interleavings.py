"""Every order in which the storage calls of two jobs that want one run may come: the catalog's own code, on a storage in memory.

A job that has had the run (it saves, replaces a step, retires one, points to the best) and one that takes it (and resumes, then does
the same), or two that take it at the same time; on a storage that can exchange two names, and on one that cannot. Each of them may be
killed, or paused for ever, at any call: after every one a third job takes the run and looks at what is there.

lost: a step that was reported as committed is gone, and no job that had the run replaced or retired it. torn: a step in view is not
whole, or ``latest`` names none. double_commit: a job changed what is in view after one that took the run later had resumed.
"""

import logging
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from msgspec.structs import replace

from benchmarks.harness import Result, Row, main
from benchmarks.memory_storage import Disk, MemoryStorage
from engine.catalog import delete_step, lease, point_best, read_manifest
from engine.catalog.history import latest_step
from engine.errors import EngineError
from engine.format.manifest import Line, Manifest, Summary
from engine.format.names import BEST, LATEST, attempt_name, parse_step, step_name
from engine.format.record import decode_record, encode_record
from engine.transfer.commit import commit_attempt
from engine.transfer.write import write_whole

FILE = "rank_00000.index"
Act = tuple[str, int]
"""What a job does with a step: ``save`` (also over one that is there), ``retire`` it, or point to it as the ``best``."""

ACTS: tuple[Act, ...] = (("save", 30), ("save", 20), ("retire", 10), ("best", 10))
FIRST = (10, 20)
"""The steps that are there at the start, saved by a job that is still at it."""


_ENDED = ("ended",)


class _Next(BaseException):
    """What a job asks for next."""


class Job:
    """A program of storage calls: what it asks for next follows from what it was answered, so it is run again from its start."""

    def __init__(self, number: int, acts: tuple[Act, ...], can_exchange: bool, held: str = "") -> None:
        self.number, self.acts, self._can_exchange, self._held = number, acts, can_exchange, held
        self._known: dict[tuple[Any, ...], tuple[str, tuple[Any, ...]] | None] = {}

    def next(self, seen: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]] | None:
        """The call after those that were answered by ``seen``; None at the end."""
        if seen not in self._known:
            answers = iter(seen)

            def call(name: str, args: tuple[Any, ...]) -> Any:
                for failed, value in answers:
                    if failed:
                        raise value[0](*value[1])
                    return value
                raise _Next(name, args)

            try:
                with _always_the_same(self.number):
                    self._run(call)
                self._known[seen] = None
            except _Next as e:
                self._known[seen] = e.args  # type: ignore[assignment]
        return self._known[seen]

    def _run(self, call: Callable[..., Any]) -> None:
        storage = MemoryStorage(call, self._can_exchange, self.number)
        try:
            held = self._held or lease.take(storage)
            if not self._held:
                latest_step(storage)
                call("note", ("resumed", 0))
            for count, (act, step) in enumerate(self.acts, 1):
                call("note", (act, step))
                if act == "save":
                    save(storage, held, step, 100 * self.number + count)
                elif act == "retire":
                    delete_step(storage, step_name(step), held)
                else:
                    point_best(storage, step_name(step), held)
                call("note", ("done", 100 * self.number + count))
        except (EngineError, FileNotFoundError):
            pass  # the job ends


def _always_the_same(number: int) -> Any:
    """Names that are made up are the same each time that a job is run again."""
    made = iter(range(1, 1 << 16))
    return mock.patch.object(os, "urandom", lambda count: (number * 65536 + next(made)).to_bytes(count, "big"))


def save(storage: MemoryStorage, held: str, step: int, uid: int) -> None:
    """As a Checkpointer does: an attempt, a rank's file, the commit. ``uid`` is in every file."""
    attempt = attempt_name(held, step_name(step), uid)
    storage.claim_folder(attempt)
    write_whole(storage, f"{attempt}/{FILE}", b"%d" % uid)
    commit_attempt(storage, attempt, Manifest(replace(_HEAD, step=step, attempt=attempt), (), {}, (), encode_record({"uid": uid})))


_HEAD = Summary("single", 1, 0, 0, 0, 1.0, "", (Line("a", 0),), {}, "", "", -1, 0, 0)


def at_once(disk: Disk, job: int = 9) -> MemoryStorage:
    """A storage whose calls are carried out when they are made."""
    return MemoryStorage(disk.apply, job=job)


def in_view(storage: MemoryStorage) -> dict[int, int]:
    """Of every visible step, its number and the save that it holds. Raises where one is not whole."""
    found = {}
    for name in storage.names(""):
        if (number := parse_step(name)) is not None:
            found[number] = decode_record(read_manifest(storage, name).record)["uid"]
            if sorted(storage.names(name)) != ["manifest", FILE] or storage.read(f"{name}/{FILE}", 100) != b"%d" % found[number]:
                raise EngineError(f"{name} is not whole")
    return found


class Explorer:
    """Goes through all states that two jobs can reach from ``disk``. A state is the disk, and what each job was answered."""

    def __init__(self, disk: Disk, jobs: tuple[Job, Job], saved: dict[int, int]) -> None:
        self._jobs, self._saved = jobs, saved
        self._found: dict[tuple[Any, ...], dict[int, int] | None] = {}
        self.states = 0
        self.faults = {"lost": 0, "torn": 0, "double_commit": 0}
        self._explore(disk)

    def _explore(self, disk: Disk) -> None:
        start = (disk, ((), ()), ((), ()))
        known, waiting = {(disk.key(), ((), ()), ((), ()))}, [start]
        while waiting:
            disk, seen, notes = waiting.pop()
            self.states += 1
            self._check(disk, notes)
            for turn in (0, 1):
                asked = None if seen[turn] is _ENDED else self._jobs[turn].next(seen[turn])
                if asked is None:
                    continue
                after, answer, noted = disk.copy(), None, notes[turn]
                if asked[0] == "note":
                    answer, noted = (False, None), (*noted, asked[1])
                else:
                    answer = _answer(after, *asked)
                    if not answer[0]:
                        self._judge(asked, turn, notes)
                told = (*seen[turn], answer)
                if self._jobs[turn].next(told) is None:  # what it saw no longer matters
                    told = _ENDED
                now, noted = _with(seen, turn, told), _with(notes, turn, noted)
                key = (after.key(), now, noted)
                if key not in known:
                    known.add(key)
                    waiting.append((after, now, noted))

    def _judge(self, asked: tuple[str, tuple[Any, ...]], turn: int, notes: tuple[Any, Any]) -> None:
        """Whether an act that changed what is in view came after a job that took the run later had resumed."""
        call, args = asked
        names = {"rename": args[1::2], "exchange": args[1::2]}.get(call, ())
        shown = [name for name in names if parse_step(name) is not None or name in (LATEST, BEST)]
        later = notes[1 - turn]
        if shown and ("resumed", 0) in later and self._has_older_lease(turn, notes):
            self.faults["double_commit"] += 1

    def _has_older_lease(self, turn: int, notes: tuple[Any, Any]) -> bool:
        """A job that resumed had the newest lease then: where both did, both claims were in order of their notes."""
        return turn == 0 if self._jobs[0]._held else ("resumed", 0) not in notes[turn]

    def _check(self, disk: Disk, notes: tuple[Any, Any]) -> None:
        """Both jobs stop here for ever, and a third one takes the run."""
        key = disk.key()
        if key not in self._found:
            self._found[key] = _recovered(disk)
        found = self._found[key]
        if found is None:
            self.faults["torn"] += 1
            return
        saved, touched = dict(self._saved), set[int]()
        for job, noted in zip(self._jobs, notes, strict=True):
            begun = [note for note in noted if note[0] in ("save", "retire")]
            touched |= {step for _, step in begun}
            for count, (act, step) in enumerate(job.acts, 1):
                if act == "save" and ("done", 100 * job.number + count) in noted:
                    saved[step] = 100 * job.number + count
        both = {step for job in (0, 1) for act, step in notes[job] if act in ("save", "retire")} if all(notes) else set[int]()
        for step, uid in saved.items():
            if step not in touched and found.get(step) != uid:
                self.faults["lost"] += 1
            retired = any(note == ("retire", step) for noted in notes for note in noted)
            if step in touched and step not in both and not retired and step not in found:
                self.faults["lost"] += 1


def _with(pair: tuple[Any, Any], turn: int, value: Any) -> tuple[Any, Any]:
    return (value, pair[1]) if turn == 0 else (pair[0], value)


def _answer(disk: Disk, call: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return False, disk.apply(call, args)
    except (KeyError, OSError, EngineError) as e:
        return True, (type(e), e.args)


def _recovered(disk: Disk) -> dict[int, int] | None:
    """What a third job finds in view; None where it is not whole."""
    storage = at_once(disk.copy())
    try:
        with _always_the_same(9):
            lease.take(storage)
        found = in_view(storage)
        if found and parse_step(latest_step(storage)) not in found:
            return None
    except (EngineError, FileNotFoundError):
        return None
    return found


def scenarios(can_exchange: bool) -> list[tuple[str, Disk, tuple[Job, Job], dict[int, int]]]:
    """Name, disk, jobs, and what was saved before."""
    disk, made = Disk(), []
    storage = at_once(disk, 1)
    with _always_the_same(1):
        held = lease.take(storage)
        for count, step in enumerate(FIRST, 1):
            save(storage, held, step, count)
    saved = {step: count for count, step in enumerate(FIRST, 1)}
    for old in ACTS:
        for new in ACTS:
            jobs = (Job(2, (old,), can_exchange, held), Job(3, (new,), can_exchange))
            made.append((f"{old[0]} {old[1]}, taken by {new[0]} {new[1]}", disk.copy(), jobs, saved))
    for one in ACTS:
        jobs = (Job(2, (one,), can_exchange), Job(3, (("save", 30),), can_exchange))
        made.append((f"both take: {one[0]} {one[1]}, save 30", disk.copy(), jobs, saved))
    return made


def explore(names: tuple[str, ...] = ()) -> list[Row]:
    """Every scenario, or those named."""
    logging.getLogger("engine").setLevel(logging.CRITICAL)
    rows: list[Row] = []
    for can_exchange in (True, False):
        for name, disk, jobs, saved in scenarios(can_exchange):
            if not names or name in names:
                found = Explorer(disk, jobs, saved)
                rows.append({"jobs": name, "can_exchange": can_exchange, "states": found.states, **found.faults})
    return rows


QUICK = ("save 30, taken by save 30", "best 10, taken by retire 10")


def measure(quick: bool) -> Result:
    rows = explore(QUICK if quick else ())
    return rows, {name: sum(row[name] for row in rows) for name in ("states", "lost", "torn", "double_commit")}  # type: ignore[misc]


if __name__ == "__main__":
    main(measure, __doc__)
