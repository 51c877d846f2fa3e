"""A run's life: saves, resumes, retention, users who delete, and kills at any instant, against a model that is a dict.

Each save has a number of its own, its uid, in every file that it writes. The model knows which uid is in view under each step
number, which uid each went on from, and which step ``latest`` and ``best`` name. It never looks at lineages or at the storage.
"""

import contextlib
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import catalog
from engine.catalog import Retention, delete_step, find, point_best, steps, summaries
from engine.catalog.lease import take
from engine.errors import CheckpointNotFound
from engine.format.manifest import Line
from engine.format.names import parse_step, step_name
from engine.storage import LocalStorage
from tests.catalog.made import NAN, summary
from tests.catalog.saves import hidden, in_view, pointer, save, uid_in
from tests.kill import dying

JUNK = ["step_9", "step_00000003 (copy)", ".lease_3", ".step_00000003.old", ".step_00000003", "notes.txt", "step_0000000x", ".nfs0001", "logs"]
KILLS = st.integers(1, 12) | st.integers(13, 17) | st.integers(18, 30)  # before, around and after the rename of a save
SAVES = st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3, NAN]))


@dataclass
class Made:
    """A save, as the model remembers it for ever."""

    number: int
    parent: int | None
    value: float

    @property
    def epoch(self) -> int:
        return self.number // 3


@dataclass
class Process:
    """A training process: the save that it went on from or made last, its lease, and its line, once it has saved."""

    parent: int | None
    number: int
    lease: str
    lineage: tuple[Line, ...] | None = None


@dataclass
class Model:
    made: dict[int, Made] = field(default_factory=dict)
    view: dict[int, int] = field(default_factory=dict)
    """Number to uid."""
    aside: dict[int, int] = field(default_factory=dict)
    """Number to uid of steps that a kill has left aside: out of view, but not lost."""
    latest: str = ""
    best: str = ""

    def way_to(self, uid: int | None) -> list[int]:
        """The uids in view on the way to a save, itself included, oldest first."""
        way = []
        while uid is not None:
            if self.view.get(self.made[uid].number) == uid:
                way.append(uid)
            uid = self.made[uid].parent
        return way[::-1]

    def latest_uid(self) -> int | None:
        pointed = self.view.get(parse_step(self.latest) or 0)
        return pointed if pointed is not None else max(self.view.values(), default=None)

    def best_of(self, uids: list[int]) -> int | None:
        return min((u for u in uids if not math.isnan(self.made[u].value)), key=lambda u: (self.made[u].value, self.made[u].number), default=None)

    def name(self, uid: int | None) -> str:
        return step_name(self.made[uid].number) if uid is not None else ""


class Run(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.storage = LocalStorage(os.path.join(self.root, "run"))
        self.model = Model()
        self.junk: set[str] = set()
        self.process: Process | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(exchange=st.booleans(), numbers=st.integers(3, 6))
    def begin(self, exchange, numbers):
        """``exchange``: whether the file system can exchange two names. A line of some steps is there from the start."""
        self.exchange = exchange
        self._resume(None)
        for i in range(numbers):
            self._save(2, 0.1 * ((i * 5) % 7), None)

    # ------------------------------------------------------------ a process

    @rule(saves=st.lists(SAVES, min_size=1, max_size=3), kill=st.none() | KILLS, data=st.data())
    def train(self, saves, kill, data):
        """The process goes on, or another takes the run and resumes what it is told to. It may die in its last save."""
        if self.process is None or data.draw(st.booleans()):
            self._resume(data.draw(st.sampled_from([None, *sorted(self.model.view.values()), self.model.latest_uid()])))
        for further, value in saves[:-1]:
            self._save(further, value, None)
        self._save(*saves[-1], kill)

    def _resume(self, parent):
        with dying(None, self.exchange):
            lease = take(self.storage)
        self._cleared_up()
        self.process = Process(parent, 0 if parent is None else self.model.made[parent].number, lease)

    def _save(self, further, value, kill):
        process, model = self.process, self.model
        assert process is not None
        number, uid = max(1, process.number + further), len(model.made)
        self._find_line(process, uid)
        model.made[uid] = Made(number, process.parent, value)
        model.view, before = model.view | {number: uid}, model.view  # as if it were there already: it may be the best of all
        best = model.best_of(model.way_to(uid))
        model.view = before
        of = summary(
            number, process.lineage, epoch=number // 3, created=float(uid), metrics={"loss": value}, monitor="loss", mode="min",
            best_step=-1 if best is None else model.made[best].number,
        )  # fmt: skip
        with dying(kill, self.exchange) as death:
            save(self.storage, of, uid, process.lease)
            if best is not None:
                point_best(self.storage, model.name(best), process.lease)
        self._judge_save(number, uid, death)
        if death.happened:
            self.process = None
        else:
            assert best is None or model.best == model.name(best)
            process.parent, process.number = uid, number

    def _find_line(self, process: Process, uid: int) -> None:
        if process.lineage is None:
            if process.parent is not None:  # deleted since, or what had been aside is back: what is there now counts
                process.parent = self.model.view.get(process.number)
            process.lineage = catalog.lineage_after(self.storage, self.model.name(process.parent), f"line{uid}")

    def _judge_save(self, number, uid, death):
        """The new one, the old one, or, where two names cannot be exchanged, the old one aside. Then ``latest``, then ``best``."""
        model, view = self.model, in_view(self.storage)
        old = model.view.get(number)
        if view.get(number) == uid:
            model.view[number] = uid
            model.aside.pop(number, None)
        else:
            assert death.happened
            assert view.get(number) == old or (number not in view and not self.exchange)
            if number not in view and old is not None:
                model.aside[number] = model.view.pop(number)
        latest, best = pointer(self.storage), pointer(self.storage, "best")
        if latest != model.latest or not death.happened:
            assert (latest, model.view.get(number)) == (step_name(number), uid)
        if best != model.best:
            assert latest == step_name(number)
            assert best == model.name(model.best_of(model.way_to(uid)))
        model.latest, model.best = latest, best

    @rule(last=st.none() | st.integers(1, 3), every=st.none() | st.integers(1, 4), best=st.none() | st.integers(1, 2), kill=st.none() | KILLS)
    def retain(self, last, every, best, kill):
        latest = self.model.view.get(parse_step(self.model.latest) or 0)
        assume(latest is not None and self.process is not None)
        gone = catalog.expired(summaries(self.storage), self.model.latest, Retention(last, every, best))
        made, way = self.model.made, self.model.way_to(latest)
        kept = set(self.model.view.values()) - set(way)
        if last is None:
            kept = set(self.model.view.values())
        else:
            kept |= set(way[-last:])
            kept |= {uid for uid in way if every and made[uid].number % every == 0}
            kept |= set(sorted((u for u in way if not math.isnan(made[u].value)), key=lambda u: (made[u].value, made[u].number))[: best or 0])
            kept |= {uid for uid in way if made[uid].number == dict(summaries(self.storage))[self.model.latest].best_step}
        assert self.model.latest not in gone
        assert set(gone) == {self.model.name(uid) for uid in self.model.view.values()} - {self.model.name(uid) for uid in kept}
        with dying(kill, self.exchange) as death:
            for name in gone:
                delete_step(self.storage, name, self.process.lease)
        self._judge_deletion(gone, death)

    def _judge_deletion(self, gone, death):
        """In order: those before the kill are gone, those after it are there, all of them."""
        view = in_view(self.storage)
        there = [parse_step(name) in view for name in gone]
        assert there == sorted(there)
        assert death.happened or not any(there)
        for name in gone[: there.count(False)]:
            number = parse_step(name)
            del self.model.view[number]
            self.model.aside.pop(number, None)
        if death.happened:
            self.process = None

    @rule(kill=st.none() | KILLS)
    def take(self, kill):
        """A process takes the run, and may die of it; it does not train."""
        self.process = None
        with dying(kill, self.exchange) as death:
            take(self.storage)
        if death.happened:
            view = in_view(self.storage)
            self.model.view |= {number: self.model.aside.pop(number) for number in list(self.model.aside) if number in view}
        else:
            self._cleared_up()
            assert not hidden(self.storage), "swept clean"

    def _cleared_up(self) -> None:
        self.model.view |= self.model.aside
        self.model.aside.clear()

    # -------------------------------------------------------------- a user

    @precondition(lambda self: self.model.view)
    @rule(by_us=st.booleans(), kill=KILLS, data=st.data())
    def delete_a_step(self, by_us, kill, data):
        number = data.draw(st.sampled_from(sorted(self.model.view)))
        if by_us:
            if self.process is None:
                self._resume(None)
            with dying(kill, self.exchange) as death:
                delete_step(self.storage, step_name(number), self.process.lease)
            self._judge_deletion([step_name(number)], death)
            return
        shutil.rmtree(self.storage.path(step_name(number)))
        del self.model.view[number]
        left = [name for name in hidden(self.storage) if f"/{step_name(number)}." in name and name.endswith(".replaced")]
        if left:  # of a save that was killed before it could remove what it had replaced: the next sweep takes it for the step
            self.model.aside[number] = max(uid_in(self.storage, name) for name in left)

    @rule(pointer=st.sampled_from(["latest", "best"]), junk=st.sampled_from(JUNK))
    def delete_a_pointer_and_add_junk(self, pointer, junk):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.storage.path(pointer))
        setattr(self.model, pointer, "")
        os.makedirs(self.storage.path(junk), exist_ok=True)
        self.junk.add(junk)

    # ----------------------------------------------------------- what holds

    @invariant()
    def every_step_in_view_is_whole_and_none_is_lost(self):
        assert in_view(self.storage) == self.model.view
        assert [step.number for step in steps(self.storage)] == sorted(self.model.view)

    @invariant()
    def latest_is_what_the_model_says(self):
        expected = self.model.latest_uid()
        if expected is None:
            with pytest.raises(CheckpointNotFound):
                find(self.storage.root, "latest")
        else:
            assert find(self.storage.root, "latest")[1] == self.model.name(expected)

    @invariant()
    def the_heads_know_who_descends_from_whom(self):
        heads = {s.step: s for _, s in summaries(self.storage)}
        for number, uid in self.model.view.items():
            way = {self.model.made[u].number for u in self.model.way_to(uid)}
            assert {other for other, head in heads.items() if catalog.descends_from(heads[number], head)} == way, number

    @invariant()
    def junk_stays(self):
        assert all(os.path.exists(self.storage.path(name)) for name in self.junk)

    @precondition(lambda self: self.model.view)
    @rule(data=st.data())
    def look(self, data):
        model, root = self.model, self.storage.root
        number = data.draw(st.sampled_from(sorted(model.view)))
        assert find(root, f"step:{number}")[1] == step_name(number)

        way = model.way_to(model.view[number])[:-1]
        assert catalog.previous(self.storage, step_name(number)) == (model.name(way[-1]) if way else None)

        epoch, present = number // 3, model.way_to(model.latest_uid())
        here = [uid for uid in present if model.made[uid].epoch == epoch]
        elsewhere = max(uid for uid in model.view.values() if model.made[uid].epoch == epoch)
        assert find(root, f"epoch:{epoch}")[1] == model.name(here[-1] if here else elsewhere)

        pointed = model.view.get(parse_step(model.best) or 0)
        best = model.best if pointed in present else model.name(model.best_of(present))
        if best:
            assert find(root, "best")[1] == best
        else:
            with pytest.raises(CheckpointNotFound):
                find(root, "best")


TestRun = Run.TestCase
TestRun.settings = settings(stateful_step_count=12)
