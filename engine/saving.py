"""Saves after their capture: in flight behind training, one after another, each agreed on by all ranks through the job's store.

A save's round is one exchange: every rank reports that its files are durable, with digests of what all must have alike; rank 0
compares, commits, and its decision is every rank's outcome. No collective of a training group is involved.
"""

import atexit
import contextlib
import logging
import os
import statistics
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch

from engine.errors import EngineError, PeerError, StorageError
from engine.events import SaveEvent, Sink, emit, warn_counted
from engine.format.manifest import IndexEntry, Manifest, Summary
from engine.format.names import attempt_name, step_name
from engine.plan.image import ShardLayout
from engine.storage import Storage
from engine.sync import Ranks, compare
from engine.transfer import replicas
from engine.transfer.process import Commit, Plan, Settings, Settle, Take, Tidy, UseImage, Write, WriterProcess
from engine.transfer.stage import LiveImages
from engine.transfer.staging import Copies, Pending, StagingImage, fits_memory, image_bytes
from engine.transfer.write import Written
from engine.writer import Scribe

logger = logging.getLogger("engine")

OnFailure = Literal["raise", "warn"]

_SETTLE_SHARE = 0.25
"""Of the timeout: how long to look for what became of a commit that failed."""


def _no_manifest(*_: Any) -> Manifest:
    raise PeerError("a rank reported a save that it could not begin")


@dataclass
class Save:
    """One save under way. ``alike``: what must be the same on all ranks; ``shared``: digests of replicated tensors; ``manifest``: the
    step's, once all ranks have written (rank 0's word counts); ``on_change`` hears of frozen tensors that have changed; ``failure``: why
    this rank could not begin it. ``attempt`` and what follows are set as the save proceeds."""

    step: int
    began: float
    record: bytes = b""
    alike: dict[str, Any] = field(default_factory=dict)
    shared: replicas.Digests = field(default_factory=replicas.Digests)
    manifest: Callable[[str, Sequence[IndexEntry], int], Manifest] = _no_manifest
    wandb_run_id: str = ""
    on_change: Callable[[list[int]], None] = lambda _: None
    failure: BaseException | None = None
    number: int = 0
    attempt: str = ""
    write: Callable[[], Written] | None = None
    commit: Callable[[Manifest], None] | None = None
    tidy: Callable[[Summary], None] | None = None
    settle: Callable[[], bool] | None = None
    is_settled: bool = False
    slot: int = -1
    pending: Pending | None = None
    blocked: float = 0.0
    staged: float = 0.0
    written: float = 0.0
    size_bytes: int = 0
    reused_bytes: int = 0
    steps: list[float] = field(default_factory=list)


class Saves:
    """A checkpointer's saves. ``max_in_flight``: how many may be behind training at once, and so how many images are kept in memory; with
    0 a save is written, a window at a time, before it returns, and there is no writer process.

    Every rank's saves go through the same calls in the same order.
    """

    def __init__(
        self, ranks: Ranks, storage: Storage, settings: Settings, max_in_flight: int, on_failure: OnFailure = "raise", sinks: Sequence[Sink] = ()
    ) -> None:
        self._ranks, self._settings, self._sinks, self._on_failure = ranks, settings, sinks, on_failure
        self._scribe = Scribe(storage, settings)
        self._max_in_flight = max_in_flight
        self._images: dict[int, StagingImage] = {}
        self._copies: dict[int, tuple[list[torch.Tensor], ShardLayout, Copies]] = {}
        self._plan: Plan | None = None
        self._told: set[int] = set()  # slots whose images the present process has
        self._process: WriterProcess | None = None
        self._streams = max_in_flight == 0
        self._number = 0
        self.lease = ""
        """Of the run, once this job has taken it: alike on all ranks."""
        self._taken = ""
        self.committed = ""
        """The step that was committed last, or resumed from: files of it may be linked."""
        self._flying: deque[Save] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []
        self._stop = lambda: None
        self._owner = os.getpid()
        if max_in_flight:
            self._start_process()
        _open.add(self)

    # ------------------------------------------------------------------ called by the trainer's thread

    def check(self) -> None:
        """Raises what a save behind training failed with, once."""
        with self._changed:
            failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise failure

    def stage(self, save: Save, plan: Plan, views: list[torch.Tensor], late: frozenset[str]) -> None:
        """Copy the state, or get ready to write it from where it lies. ``late``: the names of tensors that only an optimizer's step
        changes."""
        self.lay_out(plan)
        slot = self._free_slot(plan.layout)
        if slot is None:
            images = LiveImages(plan.layout, views)
            save.write = lambda: self._scribe.write(save.attempt, plan.layout, images, save.record, self.committed)
            save.commit = lambda manifest: self._scribe.commit(save.attempt, manifest, save.wandb_run_id)
            save.tidy = self._scribe.tidy
            save.settle = lambda: self._scribe.settle(save.attempt)
            return
        save.pending = self._copies_into(slot, plan.layout, views, late).start()
        save.write, save.commit = lambda: self._ask_write(save), lambda manifest: self._ask_commit(save, manifest)
        save.tidy = lambda summary: self._running().ask(f"clear up after step {save.step}", Tidy(summary))
        patience = self._ranks.timeout_seconds * _SETTLE_SHARE
        save.settle = lambda: self._running().ask(f"settle step {save.step}", Settle(save.attempt), patience_seconds=patience)
        save.slot = slot

    def submit(self, save: Save) -> None:
        """Let go of what is staged; what is not is written, or told to the other ranks as this one's failure, before this returns. Every
        rank submits every save, also one that failed here before it began: ranks count them alike."""
        self._number += 1
        save.number = self._number
        if save.slot >= 0:
            self._fly(save)
            return
        self.wait_idle()
        try:
            self._carry_out(save)
        except BaseException:
            if save.failure is None:
                raise

    def prepare(self, plan: Plan, views: list[torch.Tensor], late: frozenset[str]) -> None:
        """All that a first :meth:`stage` with these would do once."""
        self.lay_out(plan)
        if self._images and not self._flying:
            self._copies_into(next(iter(self._images)), plan.layout, views, late)

    def lay_out(self, plan: Plan) -> None:
        """From now on saves follow this plan: memory for one image of it is allocated, or found not to fit."""
        if self._plan is plan:
            return
        self.wait_idle()
        self._plan, self._told = plan, set()
        self._copies.clear()
        size_bytes = image_bytes(plan.layout)
        if not self._max_in_flight:
            return
        for slot, image in list(self._images.items()):
            if image.size_bytes != size_bytes:
                self._images.pop(slot).close()
        self._streams = not self._images and not self._allocate(0, size_bytes)
        if self._streams:
            logger.warning(
                "a copy of this rank's %.1f GB does not fit the memory that is free: saves are written straight from the live state, and training "
                "waits for them. Give the job more memory, or max_in_flight=0 to do so without this warning", size_bytes / 1e9,
            )  # fmt: skip

    def before_change(self) -> None:
        """Before an optimizer's step, in its hook."""
        for save in list(self._flying):
            if save.pending is not None:
                save.pending.before_change()

    def note_step(self) -> None:
        """After an optimizer's step, in its hook."""
        if self._flying:
            now = time.perf_counter()
            for save in list(self._flying):
                save.steps.append(now)

    def take(self) -> str:
        """Take the run for this job, on rank 0; returns the lease's name. A job takes it once: one that has lost it stays without."""
        if not self._taken:
            self._taken = self._running().ask("take the run", Take()) if self._max_in_flight else self._scribe.take()
        return self._taken

    def wait_idle(self) -> None:
        """Until nothing is in flight. What failed is kept for :meth:`check`. Each part of a save has a timeout of its own."""
        with self._changed:
            while self._flying:
                self._changed.wait()

    def close(self) -> None:
        """Every rank calls this, or ends; more than once is no error. In a fork of the process that made this it does nothing."""
        if os.getpid() != self._owner:
            return
        self.wait_idle()
        if self._process is not None:
            self._ranks.leave()
        self._stop()
        for image in self._images.values():
            image.close()
        self._images.clear()
        self._copies.clear()
        self._process, self._plan = None, None

    # ------------------------------------------------------------------ memory and process

    def _free_slot(self, layout: ShardLayout) -> int | None:
        """A place for the next image; None where saves are streamed. Waits while all are in flight."""
        if self._streams:
            self.wait_idle()
            return None
        told = False
        with self._changed:
            while True:
                used = {save.slot for save in self._flying}
                free = [slot for slot in self._images if slot not in used]
                if free:
                    return free[0]
                if len(self._images) < self._max_in_flight and self._allocate(len(self._images), image_bytes(layout)):
                    continue
                if not told:
                    warn_counted(
                        f"{self._settings.root} waits",
                        "%d saves are still in flight: this one waits. Save less often, or on faster storage",
                        len(used),
                    )
                    told = True
                self._changed.wait()

    def _allocate(self, slot: int, size_bytes: int) -> bool:
        if not fits_memory(size_bytes):
            self._max_in_flight = min(self._max_in_flight, max(slot, 1))  # asked once
            return False
        try:
            self._images[slot] = StagingImage(size_bytes, torch.cuda.is_available())
        except OSError:
            self._max_in_flight = min(self._max_in_flight, max(slot, 1))
            return False
        return True

    def _copies_into(self, slot: int, layout: ShardLayout, views: list[torch.Tensor], late: frozenset[str]) -> Copies:
        known = self._copies.get(slot)
        if known is None or known[0] is not views or known[1] is not layout:
            known = self._copies[slot] = (views, layout, Copies(layout, views, late, self._images[slot]))
        return known[2]

    def _start_process(self) -> WriterProcess:
        self._process = process = WriterProcess(self._settings, self._ranks.timeout_seconds)
        self._told = set()
        self._stop = weakref.finalize(self, process.stop)
        self._stop.atexit = False
        return process

    def _running(self) -> WriterProcess:
        """The writer process; a new one where the last has died. Raises :class:`StorageError` where it cannot even be killed."""
        if self._process is not None:
            self._process.check()
        return self._process if self._process is not None and self._process.is_alive else self._start_process()

    # ------------------------------------------------------------------ one save, in the courier's thread or the trainer's

    def _fly(self, save: Save) -> None:
        with self._changed:
            self._flying.append(save)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._courier, name="lockstep-saves", daemon=True)
            try:
                self._thread.start()
                return
            except RuntimeError as e:
                warn_counted(
                    "no thread", "%s: the limit of this user's or container's tasks is reached (ulimit -u, pids.max). Training waits for saves", e
                )
        self._courier()

    def _courier(self) -> None:
        while True:
            save = self._flying[0]
            failure: BaseException | None = None
            try:
                self._carry_out(save)
            except BaseException as e:  # noqa: BLE001 - told to the trainer at its next call
                failure = e
            with self._changed:
                self._flying.popleft()
                if failure is not None:
                    failure.add_note(f"The save of step {save.step} failed, behind training; what was committed before is as it was")
                    if self._on_failure == "raise":
                        self._failures.append(failure)
                    else:
                        logger.warning("THE SAVE OF STEP %d FAILED; training goes on, as configured. %s", save.step, failure)
                if not self._flying:
                    self._thread = None
                self._changed.notify_all()
                if self._thread is None:
                    return

    def _carry_out(self, save: Save) -> None:
        what = f"save {step_name(save.step)}"
        summaries: list[Summary] = []
        try:
            if not self.lease:
                self.lease = self._ranks.round(f"{what}: take the run", lambda: self._take_for(save), lambda taken: taken[0])
            save.attempt = attempt_name(self.lease, step_name(save.step), save.number)
            decided = self._ranks.round(
                what, lambda: self._write(save), lambda reports: self._conclude(save, reports, summaries), changes="committed"
            )
            if drifted := decided["drifted"]:
                self._ranks.round(f"{what}: compare replicas", lambda: save.shared.of(drifted), replicas.name_the_drift)
            self.committed = step_name(save.step)
            save.on_change(decided["changed"])
        except BaseException as e:
            if self._ranks.rank == 0 and save.attempt and save.settle is not None and not save.is_settled:
                with contextlib.suppress(Exception):  # what is left is cleared up after the next save
                    if save.settle():
                        e.add_note(f"{step_name(save.step)} IS COMMITTED all the same")
            raise
        emit(self._event(save), self._sinks)
        if save.tidy is not None and summaries:
            try:
                save.tidy(summaries[0])
            except Exception as e:  # noqa: BLE001 - the checkpoint is safe; the next save clears up
                warn_counted(f"{self._settings.root} tidy", "clearing up after step %d: %s", save.step, e)

    def _take_for(self, save: Save) -> str:
        """Not for one that could not begin: it makes no folder."""
        if save.failure is not None:
            raise save.failure
        return self.take() if self._ranks.rank == 0 else ""

    def _write(self, save: Save) -> dict[str, Any]:
        if save.failure is not None:
            raise save.failure
        if self._ranks.is_given_up():
            raise PeerError("the other ranks had given this save up when this rank came to it")
        assert save.write is not None
        if save.pending is not None:
            save.pending.wait()
        save.staged = time.perf_counter()
        written = save.write()
        save.written, save.size_bytes, save.reused_bytes = time.perf_counter(), written.size_bytes, written.reused_bytes
        return {"alike": save.alike, "shared": save.shared.groups, "written": msgspec.to_builtins(written, builtin_types=(bytes,))}

    def _conclude(self, save: Save, reports: list[dict[str, Any]], summaries: list[Summary]) -> dict[str, list[Any]]:
        """On rank 0, over all reports: commit, unless ranks that should be alike are not."""
        compare([report["alike"] for report in reports])
        drifted = replicas.drifted([report["shared"] for report in reports])
        if drifted:
            return {"drifted": drifted, "changed": []}
        assert save.commit is not None
        written = [msgspec.convert(report["written"], Written) for report in reports]
        indexes = [one.index for one in written] + [one.frozen for one in written if one.frozen is not None]
        manifest = save.manifest(save.attempt, indexes, sum(one.size_bytes for one in written))
        try:
            save.commit(manifest)
        except Exception as e:
            if not self._settle(save, e):
                raise
        summaries.append(manifest.summary)
        return {"drifted": [], "changed": sorted({number for one in written for number in one.changed})}

    def _settle(self, save: Save, error: Exception) -> bool:
        """Whether a commit that failed has made its step visible all the same. Whoever reads the answer must not be misled."""
        assert save.settle is not None
        save.is_settled = True
        try:
            return save.settle()
        except Exception as e:  # noqa: BLE001 - whatever it is, the answer is not known
            raise StorageError(
                f"{error}. THE STEP MAY HAVE BEEN COMMITTED all the same, which could not be found out ({e}): `engine ls` shows it"
            ) from error

    def _ask_write(self, save: Save) -> Written:
        process = self._running()
        if not self._told:
            assert self._plan is not None
            process.tell(self._plan)
        if save.slot not in self._told:
            image = self._images[save.slot]
            process.tell(UseImage(save.slot, image.size_bytes), image.fd)
            self._told.add(save.slot)
        answer = process.ask(f"write step {save.step}", Write(save.slot, save.attempt, save.record, self.committed), self._ranks.sign)
        return msgspec.convert(answer, Written)

    def _ask_commit(self, save: Save, manifest: Manifest) -> None:
        order = Commit(save.attempt, manifest.summary, manifest.indexes, manifest.record, save.wandb_run_id)
        self._running().ask(f"commit step {save.step}", order, self._ranks.sign)

    def _event(self, save: Save) -> SaveEvent:
        now, times = time.perf_counter(), [b - a for a, b in zip(save.steps, save.steps[1:], strict=False)]
        slow = statistics.quantiles(times, n=100)[98] if len(times) > 1 else max(times, default=0.0)
        return SaveEvent(
            step=save.step,
            blocked_seconds=save.blocked or now - save.began,
            staged_seconds=save.staged - save.began,
            written_seconds=save.written - save.began,
            committed_seconds=now - save.began,
            size_bytes=save.size_bytes,
            reused_bytes=save.reused_bytes,
            steps=len(save.steps),
            step_p50_seconds=statistics.median(times) if times else 0.0,
            step_p99_seconds=min(slow, max(times, default=0.0)),
            step_max_seconds=max(times, default=0.0),
        )


def watch_steps(optimizers: Sequence[torch.optim.Optimizer], saves: Saves) -> None:
    """Copies end before an optimizer changes what they copy, and steps are timed while saves are in flight."""
    known = weakref.ref(saves)

    def before(*_: Any) -> None:
        if (found := known()) is not None:
            found.before_change()

    def after(*_: Any) -> None:
        if (found := known()) is not None:
            found.note_step()

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


_open: "weakref.WeakSet[Saves]" = weakref.WeakSet()


_failed_at_exit = False


@atexit.register
def _exit_with_failure() -> None:
    """Registered first, so that it is called after what the program has registered: an exit code is all that a launcher sees."""
    if _failed_at_exit:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(EngineError.exit_code)


@atexit.register
def _drain() -> None:
    """A normal end of the interpreter loses no save that is in flight."""
    global _failed_at_exit
    for saves in list(_open):
        saves.close()
        while True:
            try:
                saves.check()
                break
            except Exception as e:  # noqa: BLE001 - nobody is left to catch it
                logger.error("a save that was in flight when the process ended has failed, so the exit code is not 0: %s", e)
                _failed_at_exit = True
