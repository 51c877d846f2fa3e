"""Ranks that act in step, through the job's store: no collective on a training group, no wait without a timeout.

A *round* is: every rank does its part, reports its result or its error, and reads one decision. Rank 0 gathers the reports
and decides; the decision is a single compare-and-set, so a rank that gives up waiting and rank 0 cannot decide differently. Where
deciding changes something (a commit), rank 0 claims the decision first: from then on no other rank can decide that it failed.
"""

import contextlib
import os
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.errors import EngineError, PeerError, error_class
from engine.timed import Store, TimedStore

_POLL_SECONDS = (0.0005, 0.1)  # first and longest pause between two looks at the store
_LOOKS_A_SECOND = 10_000  # of all waiting ranks together: each look costs the store some 10 µs of its one thread
_TOGETHER = -1  # in place of a rank: what rank 0 concluded from all reports
_TOKEN_BYTES = 8
_SIGN_SHARE = 0.1  # of the timeout, between two signs of life
_GRACE = 1.25  # ranks wait longer for the decision than rank 0 for the reports, so that the decision can name who is missing
_SHORT = 0.25  # of the timeout: for calls that end a round, and for whoever did not come to the round before


class _Failure(msgspec.Struct):
    rank: int
    kind: str
    message: str
    trace: str = ""
    is_late: bool = False
    """A rank did not come in time."""
    ends: bool = False
    """Ranks make different calls: which round a report is for is no longer known."""


class _Report(msgspec.Struct):
    what: str
    value: Any = None
    failure: _Failure | None = None


class _Decision(msgspec.Struct):
    value: Any = None
    failure: _Failure | None = None
    is_claim: bool = False
    """Rank 0 is about to carry out what it decided, and says later how that ended."""


_CLAIM = msgspec.msgpack.encode(_Decision(is_claim=True))


def _failure(rank: int, error: BaseException) -> _Failure:
    return _Failure(rank, type(error).__name__, _plain(str(error)), _plain("".join(traceback.format_exception(error))))


@dataclass
class Ranks:
    """The ranks of one job, seen from one of them.

    Values that travel are what msgpack carries: None, bool, int, float, str, bytes, list, dict. A round that was given up, because a rank
    did not come in time, does not end the rounds after it: that rank finds the decision when it comes. It is waited for less long then.
    """

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    timeout_seconds: float = 600.0
    _number: int = 0
    _broken: str = ""
    _signed: float = 0.0
    _was_late: bool = False
    _decided: list[list[str]] = field(default_factory=list)

    def gather(self, what: str, act: Callable[[], Any]) -> list[Any]:
        """Run ``act`` here and return every rank's result, in rank order.

        Every rank calls this, once a round and in the same order. If one raises, all raise an error of that class that names
        the rank; if one does not come within ``timeout_seconds``, all raise :class:`PeerError` naming it.
        """
        return self.round(what, act, lambda values: values)

    def collect(self, what: str, act: Callable[[], Any]) -> list[Any]:
        """As :meth:`gather`, but the results reach rank 0 only; elsewhere the list is empty. Every rank calls this."""
        kept: list[Any] = []
        self.round(what, act, kept.extend)
        return kept

    def first(self, what: str, act: Callable[[], Any]) -> Any:
        """Run ``act`` on rank 0 only; every rank returns its result, or raises its error. Every rank calls this."""
        return self.round(what, act if self.rank == 0 else lambda: None, lambda values: values[0])

    def agree(self, what: str, act: Callable[[], dict[str, Any]]) -> None:
        """Run ``act`` on every rank; what it returns must be the same everywhere. Every rank calls this.

        Keys are worded to follow "ranks […]" and precede "than rank 0". Raises :class:`PeerError` on all ranks, naming who differs.
        """
        self.round(what, act, compare)

    def round(self, what: str, act: Callable[[], Any], conclude: Callable[[list[Any]], Any], changes: str = "") -> Any:
        """Run ``act`` on every rank and ``conclude`` on rank 0, over all results: what it returns, or raises, every rank returns or
        raises. Every rank calls this, once a round and in the same order.

        ``changes``: what ``conclude`` does that cannot be undone, if anything: no rank then reports that it was not done unless that is
        so, and one that cannot know says that it may have been done. Worded to follow "may have been".
        """
        if self.world_size == 1 or self.store is None:
            values = [act()]
            try:
                return conclude(values)
            except EngineError as e:
                raise type(e)(f"{what}: {e}") from e
        if self._broken:
            raise PeerError(f"rank {self.rank}: the ranks are out of step since an earlier failure ({self._broken}); restart the job")
        self._number += 1
        report, error = _Report(what), None
        try:
            report.value = act()
            msgspec.msgpack.encode(report)  # a value that cannot travel is this rank's error like any other
        except BaseException as e:
            error, report.value = e, None
            report.failure = _failure(self.rank, e)
            if not isinstance(e, Exception):  # the process is being ended: tell the others, do not wait for them
                self._end_by(_SHORT)
                with contextlib.suppress(TimeoutError):
                    if self.rank:
                        self._report(what, report)
                    else:
                        ended = msgspec.msgpack.encode(_Decision(failure=report.failure))
                        if self.store.compare_set(self._word(bool(changes)), b"", ended) == ended:
                            self.store.set(f"{self._prefix}/decision", ended)
                raise
        decision = self._exchange(what, report, conclude, changes)
        failure = decision.failure
        if failure is None:
            return decision.value
        if error is not None and failure.rank == self.rank:
            if isinstance(error, EngineError):
                raise error
            raise PeerError(f"{what}: rank {self.rank} failed: {failure.kind}: {failure.message}") from error
        kind = error_class(failure.kind)
        if failure.rank == _TOGETHER:
            raise kind(f"{what}: {failure.message}")
        detail = failure.message if issubclass(kind, EngineError) and kind.__name__ == failure.kind else failure.trace
        raise kind(f"{what}: rank {failure.rank} failed: {detail or failure.message}")

    def leave(self, patience_seconds: float = 10.0) -> None:
        """The last round, if all come to it within ``patience_seconds``: afterwards rank 0, whose process may host the store, knows that
        every rank has read what was decided, and may end. Every rank may call this, once; it raises nothing."""
        if self.world_size == 1 or self.store is None or self._broken:
            return
        self.timeout_seconds = min(self.timeout_seconds, patience_seconds)
        try:
            self.gather("leave", lambda: None)
            deadline = time.monotonic() + patience_seconds
            for key in [f"{self._prefix}/{rank}" for rank in range(1, self.world_size)] if self.rank == 0 else []:
                while self.store.check([key]) and time.monotonic() < deadline:  # who has read the decision deletes its report
                    time.sleep(0.01)
        except (EngineError, RuntimeError, OSError):
            pass
        self._broken = self._broken or "the ranks have left"

    def sign(self) -> None:
        """Show the other ranks that this one lives, while it does its part of a round that takes long: they wait on. Any thread that
        is in :meth:`round` calls this, as often as it likes."""
        now = time.monotonic()
        if self.store is not None and now - self._signed > self.timeout_seconds * _SIGN_SHARE:
            self._end_by(_SHORT)
            with contextlib.suppress(RuntimeError, OSError):  # the report after it finds out
                self._show_life()

    def is_given_up(self) -> bool:
        """Whether the round that this rank is in was decided without it: then its part is for nothing. Looks only after a round that
        was late. For who is in :meth:`round`."""
        self._end_by(_SHORT)
        with contextlib.suppress(RuntimeError, OSError):
            return self.store is not None and self._was_late and self.store.check([self._word(True)])
        return False

    def _show_life(self) -> None:
        assert self.store is not None
        self._signed = time.monotonic()
        self.store.set(f"{self._prefix}/alive/{self.rank}", os.urandom(_TOKEN_BYTES))

    @property
    def _prefix(self) -> str:
        """Of the keys of this round."""
        return f"lockstep/{self._number}"

    def _end_by(self, share: float) -> None:
        """Calls to the store end within this share of the timeout, from now on."""
        if isinstance(self.store, TimedStore):
            self.store.until = time.monotonic() + share * self.timeout_seconds

    def _report(self, what: str, report: _Report) -> None:
        assert self.store is not None
        try:
            self.store.set(f"{self._prefix}/{self.rank}", msgspec.msgpack.encode(report))
        except TimeoutError:
            raise
        except (RuntimeError, OSError) as e:
            raise self._lost(what, e) from e

    def _lost(self, what: str, error: Exception) -> PeerError:
        self._broken = f"{what}: the job's store is lost"
        return PeerError(f"{what}: rank {self.rank} lost the job's store ({error}); the process that hosts it has ended. Restart the job.")

    def _exchange(self, what: str, report: _Report, conclude: Callable[[list[Any]], Any], changes: str) -> _Decision:
        """A rank sends: its report, looks for the decision, the decision's read, and its report's removal; rank 0, whose own report
        does not travel, reads all reports at once where the store can."""
        assert self.store is not None
        patience = self.timeout_seconds * (_SHORT if self._was_late else 1.0)
        self._end_by(_GRACE)
        try:
            if self.rank:
                self._report(what, report)
                raw = self._await(patience * _GRACE, bool(changes))
            else:
                raw = self._decide(patience, report, conclude, bool(changes))
            self._tidy()
        except TimeoutError as e:
            self._was_late = True
            raise PeerError(
                f"{what}: rank {self.rank} waited {patience * _GRACE:.0f} s in vain for the job's store; rank 0, whose process hosts it, is "
                f"stopped, or the network is.{_unknown(changes)} The next call tries again"
            ) from e
        except (RuntimeError, OSError) as e:  # torch raises DistStoreError/DistNetworkError, both RuntimeErrors
            raise self._lost(what, e) from e
        decision = msgspec.msgpack.decode(raw, type=_Decision)
        if decision.is_claim:
            self._was_late = True
            raise PeerError(
                f"{what}: rank {self.rank} waited {patience * _GRACE:.0f} s for rank 0 to carry out what it had decided; it is stopped, stuck or "
                f"much slower.{_unknown(changes)} The next call tries again"
            )
        self._was_late = decision.failure is not None and decision.failure.is_late
        if decision.failure is not None and decision.failure.ends:
            self._broken = f"{what}: {decision.failure.message}"
        return decision

    def _tidy(self) -> None:
        """Remove this rank's keys: what was decided has been read, or will never be."""
        assert self.store is not None
        self._end_by(_SHORT)
        if self.rank:
            self.store.delete_key(f"{self._prefix}/{self.rank}")
        if self._signed:
            self.store.delete_key(f"{self._prefix}/alive/{self.rank}")
            self._signed = 0.0

    def _await(self, patience_seconds: float, is_claimed: bool) -> bytes:
        """The decision, on a rank that is not 0; its own, that this failed, where none came in time, or rank 0's claim."""
        assert self.store is not None
        key = f"{self._prefix}/decision"
        if self._wait([key], patience_seconds, {key: f"{self._prefix}/alive/0"}):
            return self.store.get(key)
        self._end_by(_SHORT)
        message = f"rank {self.rank} waited {patience_seconds:.0f} s for rank 0; it is dead, stuck or much slower"
        return self._first(self._word(is_claimed), _Decision(failure=_Failure(0, "PeerError", message, is_late=True)))

    def _word(self, is_claimed: bool) -> str:
        """The key of which the first value counts: rank 0's claim, where it claims the decision before it makes it, or the decision."""
        return f"{self._prefix}/{'claim' if is_claimed else 'decision'}"

    def _decide(self, patience_seconds: float, own: _Report, conclude: Callable[[list[Any]], Any], is_claimed: bool) -> bytes:
        """The decision, on rank 0: what it is, whoever made it."""
        assert self.store is not None
        word = self._word(is_claimed)
        found = self._gather(patience_seconds, own, word)
        self._end_by(_GRACE)
        if isinstance(found, _Decision):
            decision = self._first(word, found)
        elif not is_claimed:
            decision = self._first(word, self._concluded(found, conclude))
        elif (decision := self.store.compare_set(word, b"", _CLAIM)) == _CLAIM:
            decision = msgspec.msgpack.encode(self._concluded(found, conclude))
            self._end_by(_GRACE)
        if is_claimed:
            self.store.set(f"{self._prefix}/decision", decision)
        self._decided.append([word, f"{self._prefix}/decision"] if is_claimed else [word])
        if not isinstance(found, _Decision):  # all reported since those were made, so all have read them
            for past in self._decided[:-1]:
                for key in past:
                    self.store.delete_key(key)
            del self._decided[:-1]
        return decision

    def _first(self, word: str, decision: _Decision) -> bytes:
        """What stands: this, or what another rank has decided before."""
        assert self.store is not None
        return self.store.compare_set(word, b"", msgspec.msgpack.encode(decision))

    def _gather(self, patience_seconds: float, own: _Report, word: str) -> list[Any] | _Decision:
        """Every rank's value, on rank 0; a decision where that is one already, or where others have given up (``word``)."""
        assert self.store is not None
        keys = [f"{self._prefix}/{rank}" for rank in range(1, self.world_size)]
        signs = {key: f"{self._prefix}/alive/{rank}" for rank, key in enumerate(keys, 1)}
        if not self._wait(keys, patience_seconds, signs, self._show_life, word):
            self._end_by(_SHORT)
            missing = [rank for rank, key in enumerate(keys, 1) if not self.store.check([key])]
            message = (
                f"ranks {missing[:16]} did not report within {patience_seconds:.0f} s. Either they did not make this call, which every rank must "
                "make (`if rank == 0:` around it prevents that), or they crashed or hang: look at their logs"
            )
            return _Decision(failure=_Failure(missing[0] if missing else 0, "PeerError", message, is_late=True))
        reports = [own, *(msgspec.msgpack.decode(raw, type=_Report) for raw in self._read(keys))]
        failures = [report.failure for report in reports if report.failure is not None]
        if failures:
            return _Decision(failure=failures[0])
        if elsewhere := [rank for rank, report in enumerate(reports) if _call_of(report.what) != _call_of(own.what)]:
            message = (
                f"ranks {elsewhere[:16]} are at '{reports[elsewhere[0]].what}' while rank 0 is at '{own.what}'; every rank must make the same "
                "calls in the same order (`if rank == 0:` around one prevents it)"
            )
            return _Decision(failure=_Failure(elsewhere[0], "PeerError", message, ends=True))
        return [report.value for report in reports]

    def _concluded(self, values: list[Any], conclude: Callable[[list[Any]], Any]) -> _Decision:
        try:
            return _Decision(conclude(values))
        except Exception as e:  # noqa: BLE001 - a decision must be made: all wait for it
            return _Decision(failure=_failure(_TOGETHER if isinstance(e, EngineError) else 0, e))

    def _read(self, keys: list[str]) -> list[bytes]:
        store: Any = self.store
        return store.multi_get(keys) if getattr(store, "has_extended_api", bool)() else [store.get(key) for key in keys]

    def _wait(
        self,
        keys: list[str],
        timeout_seconds: float,
        signs: Mapping[str, str],
        go_on: Callable[[], None] = lambda: None,
        end: str = "",
    ) -> bool:
        """Wait for all ``keys``, again for as long as each that is missing has shown a new sign of life (``signs``, by key), which calls
        ``go_on``; not once there is the key ``end``. Polls, because the store's own wait cannot be interrupted and reports each time-out
        to stderr."""
        assert self.store is not None
        seen: dict[str, bytes] = {}
        deadline = time.monotonic() + timeout_seconds
        pause, longest = _POLL_SECONDS
        if self.rank:  # they all look at once; rank 0 looks alone
            pause, longest = max(pause, self.world_size / _LOOKS_A_SECOND / 10), max(longest, self.world_size / _LOOKS_A_SECOND)
        while not self.store.check(keys):
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [key for key in keys if not self.store.check([key])]
                found = {key: self.store.get(signs[key]) for key in missing if key in signs and self.store.check([signs[key]])}
                if any(found.get(key) in (None, seen.get(key)) for key in missing):
                    return False
                seen, deadline, left = found, time.monotonic() + timeout_seconds, timeout_seconds
                self._end_by(_GRACE)
                go_on()
            if end and pause == longest and self.store.check([end]):
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, longest)
        return True


def _unknown(changes: str) -> str:
    return f" THE STEP MAY HAVE BEEN {changes.upper()} all the same: `engine ls` shows it." if changes else ""


def _call_of(what: str) -> str:
    """Its first word: what follows may name the step, which is compared where it matters."""
    return what.partition(" ")[0]


def compare(reports: Sequence[dict[str, Any]]) -> None:
    """See :meth:`Ranks.agree`."""
    for difference, value in reports[0].items():
        odd = [rank for rank, report in enumerate(reports) if report.get(difference) != value]
        if odd:
            detail = f" ({_differing(reports[odd[0]].get(difference), value)})" if isinstance(value, list) else ""
            raise PeerError(f"ranks {odd[:16]} {difference} than rank 0{detail}; all ranks must share one state")


def _differing(theirs: Any, ours: list[Any]) -> str:
    """The entries that one of two lists has and the other has not; both lists where the order differs."""
    theirs = theirs if isinstance(theirs, list) else [theirs]
    if all(isinstance(entry, str) for entry in (*theirs, *ours)):
        some, others = ([entry for entry in a if entry not in b] for a, b in ((theirs, ours), (ours, theirs)))
        if some or others:
            return f"{', '.join(some) or 'nothing'} and {', '.join(others) or 'nothing'}"
    return f"{theirs} and {ours}"


@dataclass
class _Job:
    """A job as long as its process group lives: a name for its keys, and how many of its ranks objects were made."""

    store: "weakref.ref[Store]"
    name: str
    count: int = 0


_job: _Job | None = None


def current_ranks(timeout_seconds: float = 600.0, own_client: bool = False) -> Ranks:
    """The ranks of ``torch.distributed``'s default group; one rank where it is not initialised.

    Every rank calls this the same number of times, in the same order: each call opens a name space of its own in the store. The first
    one waits for all ranks. ``own_client``: for a thread of its own. A store's client carries out one operation at a time, and some of
    them wait. Raises :class:`PeerError` where a rank does not come within ``timeout_seconds``.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(timeout_seconds=timeout_seconds)
    global _job
    rank, world_size = dist.get_rank(), dist.get_world_size()
    default: Any = dist.distributed_c10d._get_default_store()  # the one store that every job has
    if _job is None or _job.store() is not default:
        deadline = time.monotonic() + timeout_seconds * _GRACE
        try:
            name = job_name(TimedStore(default, deadline), rank, world_size, timeout_seconds)
        except TimeoutError as e:
            raise PeerError(f"attach: rank {rank}: {e} for {timeout_seconds * _GRACE:.0f} s; is the process of rank 0 stopped?") from e
        _job = _Job(weakref.ref(default), name)
    _job.count += 1
    client = default.clone() if own_client and not _is_file(default) else default
    store: Any = dist.distributed_c10d.PrefixStore(f"lockstep-{_job.name}-{_job.count}", client)
    return Ranks(rank, world_size, TimedStore(store), timeout_seconds)


def _is_file(store: Any) -> bool:
    """Whether clients have no connection of their own. Then they are counted, and the last one removes the file: so does a forked
    worker (a DataLoader's) that collects one which it has inherited, while the job goes on."""
    import torch.distributed as dist

    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return isinstance(store, dist.FileStore)


def group_size() -> int:
    """Return the number of ranks in the default process group; 0 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


def job_name(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that all ranks have alike, and no other job that has used this store. Every rank calls this, once a process group.

    A launcher may start a job anew on the store of the last one, whose keys are still there (torchrun does, see pytorch#135712). So a
    rank takes the name that it finds only once rank 0 has answered, under that name, what this rank has made up for itself.
    """
    own, deadline = os.urandom(_TOKEN_BYTES), time.monotonic() + timeout_seconds * (1.0 if rank == 0 else _GRACE)
    pause = max(_POLL_SECONDS[0], 3 * world_size / _LOOKS_A_SECOND)
    if rank == 0:
        keys = [f"lockstep-{own.hex()}/{other}" for other in range(1, world_size)]
        store.set("lockstep-job", own)
        while keys and not store.check(keys):
            _pause(pause, deadline, lambda: f"ranks {[i for i, key in enumerate(keys, 1) if not store.check([key])][:16]} did not come")
        store.set(f"lockstep-{own.hex()}/all", own + b"".join(store.get(key) for key in keys))
        return own.hex()
    asked = ""
    while True:
        name = store.get("lockstep-job").hex() if store.check(["lockstep-job"]) else ""
        if name != asked:
            store.set(f"lockstep-{name}/{rank}", own)
            asked = name
        answer = f"lockstep-{name}/all"
        if name and store.check([answer]) and store.get(answer)[rank * _TOKEN_BYTES :].startswith(own):
            return name
        _pause(pause, deadline, lambda: "rank 0 did not answer")


def _pause(seconds: float, deadline: float, problem: Callable[[], str]) -> None:
    if time.monotonic() >= deadline:
        raise PeerError(f"attach: {problem()} in time; look at the other ranks' logs for a crash or a hang")
    time.sleep(seconds)


def _plain(text: str) -> str:
    """Text that can be encoded: paths may hold bytes that are not."""
    return text.encode(errors="replace").decode()
