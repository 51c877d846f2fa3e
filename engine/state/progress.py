"""How far a run is, and the random state of each rank."""

import math
import operator
import random
import weakref
from array import array
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import msgspec
import numpy as np
import torch

from engine.errors import UsageError
from engine.format.manifest import Count, StepNumber
from engine.format.record import EncodedList


class Best(msgspec.Struct):
    """The best value of the monitored metric so far, and where it was measured."""

    value: float
    step: StepNumber
    epoch: Count


class Follower(Protocol):
    """A sampler whose position in the data is ``progress.samples``."""

    def batch(self, samples: int) -> int: ...
    def check(self, samples: int, step: int) -> None: ...


class Progress(msgspec.Struct, dict=True):
    """``epoch``: completed epochs; ``step``: optimizer steps done; ``samples``: global samples consumed, over all epochs.

    A save keeps the rest: ``metrics``, the latest value of each; ``history``, an entry for each save that was given metrics, with
    its ``epoch`` and ``step``; ``best`` and ``stale``, with a monitor: the best value, and how many values in a row have not bettered
    it (for early stopping). ``wandb_run_id`` is for a tracker to go on under the same id.

    ``history`` may be assigned to, appended to, and have its entries replaced. An entry itself does not change once it is saved.
    """

    epoch: Count = 0
    step: StepNumber = 0
    samples: Count = 0
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    best: Best | None = None
    stale: Count = 0
    wandb_run_id: str = ""

    def advance(self, samples: int | None = None, *, batches: int = 1) -> None:
        """Count one optimizer step, for which all ranks together consumed ``samples``, by default a global batch.

        The sampler that is a member of the :class:`~engine.Checkpointer` whose ``resume`` returned this knows how many samples that
        is, for a short last batch too. ``batches``: how many global batches the step took, where it accumulates over several.

        Raises :class:`UsageError`, and counts nothing, where the sampler has no such position, or there is none to ask.
        """
        followers = self._followers()
        if samples is None:
            reached = {self._after(follower, batches) for follower in followers}
            if len(reached) != 1:
                known = "samplers have batches of different size" if reached else "no sampler follows this progress"
                raise UsageError(
                    f"advance() without samples: {known}. Give samples=, the number of samples that all ranks consumed together"
                    + ("" if reached else ", or make an ElasticSampler a member of the Checkpointer and use the progress that resume returns")
                )
            after = reached.pop()
        else:
            after = self.samples + operator.index(samples)
        for follower in followers:
            follower.check(after, self.step + 1)
        self.step += 1
        self.samples = after

    def _after(self, follower: Follower, batches: int) -> int:
        samples = self.samples
        for _ in range(operator.index(batches)):
            samples += follower.batch(samples)
        return samples

    def add_follower(self, follower: Follower) -> None:
        """Ask ``follower``, too, what a step consumes. Held weakly."""
        attributes: dict[str, Any] = self.__dict__  # type: ignore[assignment]  # not fields: what is saved and compared has none of it
        attributes.setdefault("_following", weakref.WeakSet()).add(follower)

    def remove_follower(self, follower: Follower) -> None:
        vars(self).get("_following", weakref.WeakSet()).discard(follower)

    def _followers(self) -> list[Follower]:
        return list(vars(self).get("_following", ()))

    def check(self) -> None:
        """Raise :class:`ValueError` for numbers of a stored progress that training does not reach."""
        for entry in self.history:
            _check_entry(entry)
        if self.best is not None and math.isnan(self.best.value):
            raise ValueError("the best value is NaN")

    def take(self, other: "Progress") -> None:
        """Become ``other``, in place."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(other, name))


class Monitor(msgspec.Struct, frozen=True):
    """Which metric decides what is best: the smallest (``min``) or the largest (``max``). NaN is never best."""

    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise UsageError(f"monitor={self.metric!r}: give the name of a metric")
        if self.mode not in ("min", "max"):
            raise UsageError(f"mode is {self.mode!r}; it says whether the best {self.metric} is the smallest or the largest: 'min' or 'max'")

    def is_better(self, value: float, than: float) -> bool:
        return value < than if self.mode == "min" else value > than


class Entry(dict[str, float]):
    """An entry of the history that has been checked. It cannot change, so that at a later save the same
    object needs no check.
    """

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("an entry of the history does not change once it is saved; replace it: history[i] = {**history[i], name: value}")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Entry, (dict(self),)


class History:
    """The history as of the last save, its entries checked, encoded and judged: a save does this for
    new entries only.

    ``_entries`` and the arrays have an item for each entry. What an array has is of the history up to
    and including that entry.
    """

    def __init__(self, monitor: Monitor | None = None) -> None:
        self._monitor = monitor
        self._entries: list[dict[str, float]] = []  # each an Entry
        self._encoded = bytearray()  # grows only
        self._ends = array("q")  # of the bytes in _encoded
        self._latest = array("d")  # the largest step
        self._best = array("q")  # the index of the best entry, or -1
        self._stale = array("q")

    def take_in(self, progress: Progress, metrics: Mapping[str, float]) -> Progress:
        """Return a copy of ``progress`` in plain Python numbers, with ``metrics`` taken in.

        Raises :class:`UsageError` naming what is not a number, or that the monitored metric is not
        among those given.
        """
        try:
            epoch, step, samples = (operator.index(n) for n in (progress.epoch, progress.step, progress.samples))
            given = _numbers(metrics)
            known = _numbers(progress.metrics)
            self._follow(list(progress.history))
        except (TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"progress takes whole numbers for epoch, step and samples, and numbers for metrics and history: {e}") from e
        if min(epoch, step, samples) < 0:
            raise UsageError(f"progress cannot be negative: epoch {epoch}, step {step}, samples {samples}")
        if step >= 10**18 or max(epoch, samples) > 2**62:
            raise UsageError(f"progress cannot be that far: epoch {epoch}, step {step}, samples {samples}. Steps have at most 18 digits")
        if given:
            if self._latest and step <= self._latest[-1]:  # a step that is saved again, perhaps
                self._follow([entry for entry in self._entries if entry.get("step") != step])
            self._append(Entry({"epoch": float(epoch), "step": float(step), **given}))
        taken = Progress(epoch, step, samples, {**known, **given}, self._entries.copy(), wandb_run_id=str(progress.wandb_run_id))
        if self._monitor is not None and (given or self._monitor.metric in known):
            self._judge(taken, self._monitor)
        return taken

    def adopt(self, progress: Progress) -> None:
        """Go on from a resumed ``progress``, so that the first save does not check all of its history."""
        self._follow(progress.history)
        progress.history = self._entries.copy()

    def record(self, progress: Progress) -> dict[str, Any]:
        """Return what a record holds of ``progress``, which :meth:`take_in` has just returned."""
        plain = msgspec.to_builtins(msgspec.structs.replace(progress, history=[]))
        return {**plain, "history": EncodedList(len(self._entries), self._encoded, len(self._encoded))}

    def _follow(self, history: list[dict[str, float]]) -> None:
        """Hold ``history``: what it begins with is kept as far as it is the same."""
        count = min(len(self._entries), len(history))
        if not all(map(operator.is_, self._entries, history)):
            count = next(i for i in range(count) if self._entries[i] is not history[i])
        if count < len(self._entries):
            for column in (self._entries, self._ends, self._latest, self._best, self._stale):
                del column[count:]
            self._encoded = self._encoded[: self._ends[-1] if count else 0]  # a copy: saves in flight have the other
        for entry in history[count:]:
            numbers = _numbers(entry)
            _check_entry(numbers)
            self._append(Entry(numbers))

    def _append(self, entry: Entry) -> None:
        count = len(self._entries)
        try:
            encoded = msgspec.msgpack.encode(entry)
        except UnicodeEncodeError as e:
            raise UsageError(f"entry {count} of the history has a name that UTF-8 cannot carry ({e.reason}): {list(entry)!a}") from e
        self._encoded += encoded
        self._entries.append(entry)
        self._ends.append(len(self._encoded))
        latest, best, stale = (self._latest[-1], self._best[-1], self._stale[-1]) if count else (-math.inf, -1, 0)
        step = entry.get("step", latest)
        self._latest.append(step if step > latest else latest)
        value = entry.get(self._monitor.metric) if self._monitor is not None else None
        if self._monitor is not None and value is not None:
            if value == value and (best < 0 or self._monitor.is_better(value, self._entries[best][self._monitor.metric])):
                best, stale = count, 0
            else:
                stale += 1
        self._best.append(best)
        self._stale.append(stale)

    def _judge(self, progress: Progress, monitor: Monitor) -> None:
        """Set ``best`` and ``stale`` of what :meth:`take_in` returns."""
        if monitor.metric not in progress.metrics:
            raise UsageError(
                f"monitor={monitor.metric!r} is not among the metrics {sorted(progress.metrics)} of this save; "
                "give it: save(progress, metrics={...})"
            )
        if self._entries:
            progress.stale = self._stale[-1]
            if self._best[-1] >= 0:
                entry = self._entries[self._best[-1]]
                progress.best = Best(entry[monitor.metric], int(entry.get("step", 0)), int(entry.get("epoch", 0)))


def _check_entry(entry: Mapping[str, float]) -> None:
    for name in ("step", "epoch"):
        if not 0 <= entry.get(name, 0) < 10**18:
            raise ValueError(f"an entry of the history has {name} {entry[name]}")


def _numbers(given: Mapping[str, float]) -> dict[str, float]:
    return {str(k): float(v) for k, v in given.items()}


def capture_rng() -> dict[str, Any]:
    """This rank's generators: Python, NumPy's legacy global one, torch on CPU and on each CUDA device."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tobytes(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "seed": torch.initial_seed(),
    }
    return state


def restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in state["cuda"]])


def derive_rng(seed: int, step: int, rank: int) -> None:
    """New, reproducible random state for a rank that the saved run did not have (its world size was another)."""
    words = np.random.SeedSequence([seed & (2**64 - 1), step, rank]).generate_state(4, dtype=np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    torch.manual_seed(int(words[2]) & (2**63 - 1))
