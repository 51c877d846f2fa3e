"""What the ranks of a case do: a script of training, saving and resuming, watched by the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.fuzz.cases import Case, Side
from benchmarks.fuzz.oracle import Held, differences, gather
from benchmarks.fuzz.program import Program
from engine import Checkpointer, Progress
from engine.errors import EngineError
from engine.state.names import normalise

SAMPLES_A_STEP = 12
HANG_SECONDS = 60.0
_STACKS = "stacks of rank "
_GENERIC = {
    "step",
    "lr",
    "params",
    "state",
    "weight",
    "bias",
    "model",
    "module",
    "shared",
    "count",
    "optim",
    "held",
}


@dataclasses.dataclass
class Shown:
    """``outcome``: ``equal``, ``refused``, ``different``, ``crashed``, or ``invalid`` where training alone fails. ``where`` it was
    seen, and why."""

    outcome: str
    where: str = ""
    reason: str = ""


def hanging(folder: str) -> str:
    """Where ranks stood that did not end in time: each one's innermost lines outside of torch."""
    told = []
    for name in sorted(name for name in os.listdir(folder) if name.startswith(_STACKS)):
        with open(f"{folder}/{name}") as file:
            lines = [line.strip() for line in file.read().partition("(most recent call first):")[2].splitlines()]
        own = [line for line in lines if "site-packages" not in line and line.startswith("File")]
        told.append(f"{name.removeprefix('stacks of ')}: {' < '.join([*lines[1:2], *own[:2]])}" if own else name)
    return " | ".join(told)


@contextlib.contextmanager
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


_SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": _double,
}

_ENGINE_ERRORS = {kind.__name__ for kind in EngineError.__subclasses__()}


class _Ended(Exception):
    def __init__(self, shown: Shown) -> None:
        super().__init__(shown.reason)
        self.shown = shown


def play(case: Case, part: int, folder: str, check: bool = True) -> Shown:
    """Run the source's (0) or the target's (1) script. ``check``: False only trains."""
    _quiet()
    watched = _Watched(case, part, folder, check)
    try:
        with open(f"{folder}/{_STACKS}{dist.get_rank()}", "w") as stacks:
            faulthandler.dump_traceback_later(HANG_SECONDS, file=stacks)
            try:
                watched.play()
            finally:
                faulthandler.cancel_dump_traceback_later()
        return Shown("equal")
    except _Ended as e:
        return e.shown
    except Exception:  # noqa: BLE001 - whatever training does with a restored state
        outcome = "crashed" if watched.touched else "invalid"
        return Shown(outcome, watched.where, _last_lines(traceback.format_exc()))
    finally:
        watched.close()


@dataclasses.dataclass
class _Kept:
    """What a rank held at a save, and on which engine."""

    held: Held
    progress: Progress
    side: Side


class _Watched:
    """A program, its Checkpointer, and what is expected of it. ``touched``: the engine has had a hand in what is live."""

    def __init__(self, case: Case, part: int, folder: str, check: bool) -> None:
        self.case, self.part, self.folder, self.check = case, part, folder, check
        self.side = case.sides[part]
        self.touched, self.where = False, "building"
        self.progress = Progress()
        self.program: Program | None = None
        self.checkpointer: Checkpointer | None = None
        self.waiting: list[int] = []  # steps saved by this training, of which the next losses are to be noted
        self.expected: list[tuple[float, list[int]]] = []  # the next losses, after a resume
        self.is_same = case.sides[0] == case.sides[1] or part == 0

    def play(self) -> None:
        factor = self.case.factor if self.part else 1.0
        self.program = Program(self.case, self.side, seed=self.case.seed * 10 + self.part, factor=factor)
        os.makedirs(f"{self.folder}/expected", exist_ok=True)
        if not self.case.late:
            self._attach()
        for number, op in enumerate(self.case.scripts[self.part]):
            self.where = f"{'target' if self.part else 'source'} {number}: {' '.join(map(str, op))}"
            if op[0] == "train":
                for _ in range(op[1]):
                    self._train()
            elif op[0] == "unfreeze":
                self.program.unfreeze()
            elif self.check:
                self._attach()
                self._save() if op[0] == "save" else self._resume(op[1])
        if self.checkpointer is not None:
            self.where = "at the end"
            self._guarded("close", self.checkpointer.close, gather(self.program))

    def close(self) -> None:
        if self.program is not None:
            self.program.close()

    def _attach(self) -> None:
        if self.checkpointer is not None or not self.check:
            return
        program, flying = self.program, self.case.max_in_flight[self.part]
        assert program is not None

        def make() -> None:
            self.checkpointer = Checkpointer(
                f"{self.folder}/run",
                program.model,
                max_in_flight=flying,
                timeout_seconds=20,
                **program.members,
            )

        self._guarded("attach", make, gather(program))

    def _train(self) -> None:
        assert self.program is not None
        try:
            found = self.program.step(self.progress.step)
        except EngineError as e:  # state that has just come to be is refused at once
            message = f"{type(e).__name__}: {e}"
            is_early = not self.touched and _is_meant(e)
            with contextlib.suppress(IndexError, KeyError):  # DeepSpeed's groups are in pieces inside its step
                is_early = is_early and self._names_something(message, gather(self.program))
            raise _Ended(Shown("refused" if is_early else "different", f"training, {self.where}", message)) from e
        self.progress.advance(SAMPLES_A_STEP)
        for step in self.waiting:
            self._note(step, found)
        if self.expected:
            loss, drawn = self.expected.pop(0)
            told = differences(drawn, found[1], "samples")
            if self.is_same:
                told += differences(loss, found[0], "loss")
            self._agree(told, "training after the resume")

    def _note(self, step: int, found: tuple[float, list[int]]) -> None:
        path = self._path(step, "next")
        with open(path, "rb") as file:
            known = torch.load(file, weights_only=False)
        with open(path, "wb") as file:
            torch.save([*known, found], file)

    def _save(self) -> None:
        program, checkpointer = self.program, self.checkpointer
        assert program is not None
        assert checkpointer is not None
        before = gather(program)
        step = self.progress.step
        self._guarded("save", lambda: checkpointer.save(self.progress, {"loss": 0.1 * step}), before)
        after = gather(program)
        self._agree(differences(before.everything(), after.everything()), "the save itself")
        self._keep(step, "held", _Kept(before, self.progress, self.side))
        self._keep(step, "next", [])
        if dist.get_rank() == 0:
            with open(f"{self.folder}/expected/latest", "w") as file:
                file.write(str(step))
        self.waiting = [s for s in self.waiting if s != step] + [step]

    def _resume(self, what: int | str) -> None:
        program, checkpointer = self.program, self.checkpointer
        assert program is not None
        assert checkpointer is not None
        before, named = gather(program), what if isinstance(what, str) else f"step:{what}"
        got: list[Progress] = []
        self._guarded("resume", lambda: got.append(checkpointer.resume(named)), before)
        self.touched, self.waiting = True, []
        program.resumed()
        if what == "latest":
            with open(f"{self.folder}/expected/latest") as file:
                what = int(file.read())
        kept, following = self._expected(int(what))
        after = gather(program)
        told = self._differing(kept.held.shared, after.shared, kept.side.engine)
        told += self._masters(after.shared)
        told += differences(kept.held.own, after.own) if kept.held.own else []
        told += differences(before.untouched, after.untouched)
        told += [f"progress: {kept.progress} became {got[0]}"] if kept.progress != got[0] else []
        self._agree(told, "the state after the resume")
        self.progress, self.expected = got[0], following

    def _expected(self, step: int) -> tuple[_Kept, list[tuple[float, list[int]]]]:
        """What rank 0 held at the save, and the losses after it; on as many ranks with this rank's own, and its own losses."""
        kept, following = self._read(step, 0)
        if kept.side.world_size == self.side.world_size:
            mine, following = self._read(step, dist.get_rank())
            kept.held.own = mine.held.own
        else:
            kept.held.own = {}
        self.is_same = kept.side == self.side
        return kept, following

    def _read(self, step: int, rank: int) -> Any:
        found = []
        for what in ("held", "next"):
            with open(self._path(step, what, rank), "rb") as file:
                found.append(torch.load(file, weights_only=False))
        return found

    def _keep(self, step: int, what: str, value: Any) -> None:
        with open(self._path(step, what), "wb") as file:
            torch.save(value, file)

    def _path(self, step: int, what: str, rank: int | None = None) -> str:
        return f"{self.folder}/expected/{step} {what} {dist.get_rank() if rank is None else rank}"

    def _guarded(self, name: str, act: Any, before: Held) -> None:
        """Run a call of the engine. An error ends the script: refused, if it is one of the engine's, names what it is about, and
        has changed nothing live."""
        error: BaseException | None = None
        told = ""
        try:
            with _SURROUNDINGS[self.case.around[self.part]]():
                act()
        except Exception as e:  # noqa: BLE001 - which of them it may be is what is judged
            error, told = e, _last_lines(traceback.format_exc())
        kinds: list[Any] = [None] * dist.get_world_size()
        mine = "" if error is None else "refused" if _is_meant(error) else "crashed"
        dist.all_gather_object(kinds, mine)
        if not any(kinds):
            return
        if "crashed" in kinds:
            raise _Ended(Shown("crashed", self.where, told or "another rank crashed"))
        if error is None:
            raise _Ended(
                Shown(
                    "different",
                    self.where,
                    f"refused on ranks {[i for i, k in enumerate(kinds) if k]} only",
                )
            )
        assert self.program is not None
        message = f"{type(error).__name__}: {error}"
        changed = differences(before.everything(), gather(self.program).everything())
        where = f"{name}, {self.where}"
        if changed:
            raise _Ended(Shown("different", where, f"refused, but changed {changed[:3]}: {message}"))
        if not self._names_something(message, before):
            raise _Ended(Shown("different", where, f"refused without a name: {message}"))
        raise _Ended(Shown("refused", where, message))

    def _names_something(self, message: str, before: Held) -> bool:
        assert self.program is not None
        words = {type(made).__name__ for made in (*self.program.optimizers, *self.program.schedulers)} | set(self.program.members)
        for held in (before.shared, before.untouched, before.own):
            for label in held:
                kind, _, name = label.partition(" ")
                words |= {name, normalise(name)} if kind in ("parameter", "buffer", "master") else set()
                if kind == "extra":
                    words.add(label.removeprefix("extra state "))
        for optimizer in self.program.optimizers:
            words |= {key for group in optimizer.param_groups for key in group}
            words |= {key for state in optimizer.state.values() if isinstance(state, dict) for key in state if isinstance(key, str)}
            words |= {key for key in optimizer.state if isinstance(key, str)}
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in words - _GENERIC if word)

    def _agree(self, told: list[str], where: str) -> None:
        """End on all ranks where one has seen a difference, so that none waits for others."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, told[:6])
        for rank, lines in enumerate(found):
            if lines:
                raise _Ended(Shown("different", f"{where}, {self.where}", f"rank {rank}: " + "; ".join(lines)))

    def _differing(self, was: dict[str, Any], now: dict[str, Any], engine: str) -> list[str]:
        """Of what one engine held what the other has too: masters and counters are DeepSpeed's only."""
        if engine.startswith("zero") != self.side.engine.startswith("zero"):
            was, now = ({k: v for k, v in held.items() if not k.startswith(("master ", "counters"))} for held in (was, now))
        return differences(was, now)

    def _masters(self, shared: dict[str, Any]) -> list[str]:
        """DeepSpeed's masters are what is trained with, rounded where that is bf16."""
        found = []
        for label, master in shared.items():
            if label.startswith("master "):
                low = shared[label.replace("master", "parameter", 1)]
                found += differences(master.to(low.dtype), low, f"{label} against what is trained with")
        return found


def _is_meant(error: BaseException) -> bool:
    """Whether it is an engine's error, and not a peer's news of one of another kind."""
    failed = re.search(r"rank \d+ failed: (\w+):", str(error))
    return isinstance(error, EngineError) and (failed is None or failed[1] in _ENGINE_ERRORS)


def _last_lines(told: str) -> str:
    lines = [line for line in told.strip().splitlines() if line.strip()]
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return " | ".join([*places[-2:], lines[-1].strip()])[:600]


def _quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("engine", "torch.distributed.tensor", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
