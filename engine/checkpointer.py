"""Save and load, told in order. Each step of the two pipelines is a call into the room that knows it."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import operator
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import torch

from engine import catalog, dcp, numerics
from engine.catalog import Retention
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, PeerError, UsageError
from engine.events import sinks_of
from engine.format.checksum import digest
from engine.format.manifest import IndexEntry, Line, Manifest, Summary
from engine.format.names import LATEST, step_name
from engine.format.record import encode_packed, encode_record, pack_record
from engine.loading import Loading
from engine.options import mapping, not_plain, one_of, seconds, whole, words
from engine.plan.image import ShardLayout
from engine.plan.match import Allow
from engine.planning import GlobalPlan, Plans
from engine.proof import Verify
from engine.saving import OnFailure, Save, Saves, watch_steps
from engine.state.members import Members
from engine.state.progress import History, Monitor, Progress, capture_rng, derive_rng, restore_rng
from engine.state.shard import Shard
from engine.storage import LocalStorage, Mark
from engine.surroundings import in_neutral_surroundings
from engine.sync import current_ranks, group_size
from engine.transfer import process
from engine.transfer.compare import differences
from engine.transfer.exchange import process_group
from engine.transfer.process import Settings
from engine.transfer.replicas import Comparison, Digests, Replicas
from engine.transfer.runfile import in_json
from engine.transfer.stored import StoredCheckpoint

logger = logging.getLogger("engine")

Missing = Literal["error", "fresh"]
Corrupt = Literal["error", "previous"]
Names = Literal["tolerate", "refuse"]

_LOOKS = 2
"""At how many saves modules are searched for state that nothing lists."""

_PARTLY = "The live state is now partly overwritten: resume from another checkpoint or start anew; do not train on it"


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Plans are many small objects that all live on: a full collection among them scans the whole interpreter for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Captured:
    """One save's state: live shards, of which ``stepped`` change in optimizers' steps only, and everything that is not a tensor: shared
    by all ranks, and this rank's own. ``alike`` must be the same on all ranks, as must the digests of what several ranks hold."""

    progress: Progress
    shards: list[Shard]
    stepped: frozenset[str]
    record: Any
    own_record: bytes
    alike: dict[str, Any]
    digests: Digests
    plan: GlobalPlan


class Checkpointer:
    """Saves and resumes one run. Every rank makes one, and calls its methods in the same order.

    Args:
        run: the run's folder; made on the first save.
        model: the job's only model, if there is one. Its tensors are named ``model.<fqn>``, ``optim.state.<fqn>.<key>``,
            ``buffers.<name>``.
        members: further models, each with its name before its tensors' (``generator.model.<fqn>``), and any object with
            ``state_dict`` and ``load_state_dict`` (a sampler, a grad scaler, an EMA), alike on all ranks unless wrapped in
            :class:`~engine.PerRank`.
        config: plain values describing the run, kept in ``run.json`` and in each checkpoint; differences are told on resume.
        keep_last, keep_every, keep_best, keep_abandoned: which steps stay, see :class:`~engine.catalog.Retention`; without ``keep_last``
            all do. Steps of a line of training that was left, by a resume from an earlier step, stay unless ``keep_abandoned`` is False.
        monitor, mode: the metric that decides which step is ``best``, and whether that is the smallest (``min``) or largest (``max``).
        replicas: how much of what several ranks hold alike is compared between them at each save: ``all``, a ``sample`` that goes
            round, or ``off``.
        names: whether folders with invalid step names in the run are tolerated on resume, or refused.
        max_in_flight: how many saves may be behind training at once, each with an image of this rank's state in memory; a further one
            waits. With 0, ``save`` returns when its checkpoint is durable and visible, and takes no memory.
        on_failure: whether a save that fails behind training raises at the next call, or is a warning and training goes on: then a save
            that is given up because a rank did not come in time does not keep later ones from being saved.
        events: functions that are given a :class:`~engine.events.SaveEvent` for each save, TensorBoard writers, or W&B runs.
        timeout_seconds: how long ranks wait for each other before all of them raise :class:`~engine.errors.PeerError`. A rank whose
            writer is seen to write is waited for longer.
        read_only: whether this job only resumes, as one that evaluates a run while a different one trains it. Any other takes the run
            when it resumes, or first saves: the job that had it before can no longer save.

    A model is a DeepSpeed engine, a ``nn.Module``, or a tuple ``(module, optimizer)`` or ``(module, optimizer, scheduler)``, where
    lists stand for several. What its objects list in their own ``state_dict`` and can be neither sharded nor carried is refused by name:
    here, or as soon as it exists, at the end of an optimizer's first step.

    Raises :class:`~engine.errors.LayoutError` if the live state is not laid out as the engine's adapter expects, and
    :class:`~engine.errors.UsageError` for an object that is none of these.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        model: Any = None,
        *,
        config: Mapping[str, Any] | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        keep_abandoned: bool = True,
        monitor: str | None = None,
        mode: str = "min",
        replicas: Replicas = "sample",
        names: Names = "tolerate",
        max_in_flight: int = 2,
        on_failure: OnFailure = "raise",
        events: Sequence[Any] = (),
        timeout_seconds: float = 600.0,
        read_only: bool = False,
        **members: Any,
    ) -> None:
        for name, member in members.items():
            not_plain(name, member, _OPTIONS)
        for name, word, choices in (("replicas", replicas, Replicas), ("names", names, Names), ("on_failure", on_failure, OnFailure)):
            one_of(name, word, choices)
        max_in_flight = whole("max_in_flight", max_in_flight, 0)
        timeout_seconds = seconds("timeout_seconds", timeout_seconds)
        sinks = sinks_of(events)
        self._storage = LocalStorage(run)
        self._config = mapping("config", config)
        self._retention = Retention(keep_last, keep_every, keep_best, bool(keep_abandoned))
        self._monitor = Monitor(monitor, mode) if monitor is not None else None
        for name, given in (("keep_every", keep_every), ("keep_best", keep_best)):
            if given is not None and keep_last is None:
                raise UsageError(f"{name}={given} has no effect without keep_last: all steps are kept. Give keep_last too")
        if keep_best is not None and monitor is None:
            raise UsageError(f"keep_best={keep_best} has no effect without monitor, the metric that says which step is best")
        self._history = History(self._monitor)
        self._names: Names = names
        self._read_only = bool(read_only)
        self._max_in_flight = max_in_flight = 0 if self._read_only else max_in_flight
        self._pid = os.getpid()
        self._ranks = current_ranks(timeout_seconds)
        choices = {
            "keep": (keep_last, keep_every, keep_best, keep_abandoned), "monitor": (monitor, mode), "replicas": replicas, "names": names,
            "max_in_flight": max_in_flight, "on_failure": on_failure, "timeout_seconds": timeout_seconds, "read_only": read_only,
        }  # fmt: skip
        self._comparison = Comparison(replicas, self._ranks.rank)
        with _collector_paused():
            self._ranks.agree("attach", in_neutral_surroundings(lambda: self._attach(model, members, choices)))
        self._see_one_folder()
        keep = self._retention
        settings = Settings(self._storage.root, self._ranks.rank, (keep.last, keep.every, keep.best, keep.abandoned), in_json(self._config))
        self._saves = Saves(current_ranks(timeout_seconds, own_client=True), self._storage, settings, max_in_flight, on_failure, sinks)
        watch_steps(self._members.optimizers(), self._saves)
        self._writer = dcp.ShardWriter(self._ranks.rank)
        self._plans = Plans(self._ranks.rank, self._ranks.world_size, max_in_flight)
        self._orders: tuple[GlobalPlan, process.Plan] | None = None
        self._lineage: tuple[Line, ...] | None = None  # on rank 0: from a resume, or the first save, on
        self._count = 0
        self._deferred: tuple[Progress, Mapping[str, float]] | None = None
        self._is_closed = False
        _open.add(self)
        self._has_garbage = False
        self._spoiled = ""
        self._loaded: tuple[StoredCheckpoint, dict[str, str]] | None = None

    def _attach(self, model: Any, members: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
        """Check that this rank holds what the layout rules say; that all ranks have the same is for the caller."""
        self._members = Members(model, members, self._ranks.rank)
        self._members.watch_first_steps()
        described = [shard.tensor for shard in self._members.model_shards()]
        return {
            "have a different run folder": [self._storage.root],
            "have other members": self._members.names,
            "have other options": [f"{name}={value!r}" for name, value in choices.items()],
            "have other tensors, shapes or layouts": digest(msgspec.msgpack.encode(described)),
        }

    def _see_one_folder(self) -> None:
        """Check that every rank sees the folder that rank 0 does. Every rank calls this."""
        ranks, mark = self._ranks, Mark(self._storage)
        try:
            where = ranks.first("attach", lambda: mark.leave() if ranks.world_size > 1 else "")
            ranks.gather("attach", lambda: mark.look_for(where, ranks.rank))
        finally:
            mark.remove()

    def _check_call(self) -> None:
        """That this is the process, and these are the ranks, that the checkpointer was made for."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this process ({os.getpid()}) is a fork of the one that made the checkpointer ({self._pid}), which alone may call it; make "
                "the call there"
            )
        now, made_for = group_size(), self._ranks.world_size
        if now not in (0, made_for):
            raise UsageError(
                f"the checkpointer was made for {made_for} rank{'s' * (made_for > 1)}, and the process group has {now}: make it after "
                "init_process_group, on every rank, and again where the group changes"
            )

    # ------------------------------------------------------------------ save

    @in_neutral_surroundings
    @_collector_paused()
    def save(self, progress: Progress, metrics: Mapping[str, float] | None = None) -> str:
        """Save a checkpoint of all members as step ``progress.step``; returns the name of the folder that it will have.

        Returns once this rank's state is copied: what training does from then on is not in it. Writing and committing follow behind
        training; :meth:`wait` waits for them. ``metrics`` enter ``progress.metrics`` and ``progress.history``; the monitored one moves
        ``progress.best``.

        Every rank calls this. Inside DeepSpeed's gradient accumulation the save is deferred to its boundary, and returns "". A save
        that fails behind training raises at the next call, on all ranks; if that is a save, then after it has been handed over all the
        same. What was committed before stays as it was, and the new step is not visible, unless the failure came after its rename
        (moving ``latest``), which the message then says. A step that exists is replaced. Then steps that retention does not keep are
        deleted. Another rank's error is raised as this one's.
        """
        self._check_call()
        if self._read_only:
            raise UsageError("this Checkpointer was made with read_only=True: it resumes, and leaves saving to the job that trains")
        if told := self._members.pending():
            self._defer(progress, metrics or {}, told)
            name = ""
        else:
            self._deferred = None
            name = self._save(progress, metrics or {})
        self._saves.check()  # last: others may not have heard yet of what this raises, and have one save more than this rank
        return name

    def _save(self, progress: Progress, metrics: Mapping[str, float]) -> str:
        if not self._count and self._ranks.rank == 0:
            self._report_another()
        save = Save(_step_of(progress), time.perf_counter())
        try:
            saved = self._stage(save, progress, metrics)
        except BaseException as e:  # noqa: BLE001 - told to all ranks, then raised
            saved, save.failure = progress, e
        self._count += 1
        self._saves.submit(save)
        if save.failure is not None:
            raise save.failure
        progress.take(saved)
        save.blocked = time.perf_counter() - save.began
        return f"{self._storage.root}/{step_name(save.step)}"

    def _report_another(self) -> None:
        """Two that save take each other's lease of the run, and sweep each other's attempts."""
        root = os.path.realpath(self._storage.root)
        for other in list(_open):
            if other is not self and other._count and not other._is_closed and os.path.realpath(other._storage.root) == root:
                logger.warning("a different Checkpointer of this process saves in %s too: close() one before the other saves", root)
                return

    def _stage(self, save: Save, progress: Progress, metrics: Mapping[str, float]) -> Progress:
        captured = self._capture(progress, metrics)
        save.record, save.alike, save.shared = captured.own_record, captured.alike, captured.digests
        save.manifest = partial(self._manifest, captured)
        save.on_change = partial(self._plans.note_changed, self._count, captured.plan)
        save.wandb_run_id = captured.progress.wandb_run_id
        self._hand_over(captured.plan, captured.shards, lambda plan, views: self._saves.stage(save, plan, views, captured.stepped))
        return captured.progress

    @in_neutral_surroundings
    def prepare(self) -> None:
        """Lay out the next save's plan and allocate the memory for it now, so that the first save takes no longer than others. Called
        by :meth:`resume`; a fresh run may call it after the first optimizer step, when all state exists. Every rank calls this."""
        self._check_call()
        with _collector_paused():
            self._capture_objects()
            self._prepare()
        self._collect()

    def _capture_objects(self) -> None:
        """Capture the members that are not models. Where one has a state of each rank's own, this is a round of all ranks: they
        describe each other's tensors alike."""
        if self._members.has_per_rank:
            self._members.describe_per_rank(self._ranks.gather("capture each rank's own state", self._members.capture_objects))
        else:
            self._members.capture_objects()

    def _prepare(self) -> None:
        shards, stepped = self._members.capture()
        self._members.records()
        known, plan = self._plans.last, self._plan_of(shards)
        if self._ranks.world_size > 1:
            self._comparison.prepare(shards, plan.shared, plan.turns)
        self._hand_over(plan, shards, lambda order, views: self._saves.prepare(order, views, stepped))
        self._has_garbage |= plan is not known

    def _collect(self) -> None:
        """A plan is many objects: without this some training step would search all of them for garbage."""
        if self._has_garbage and gc.isenabled():
            gc.collect()
        self._has_garbage = False

    def wait(self) -> None:
        """Wait until every save is durable and visible, and raise what one of them failed with. Every rank calls this."""
        self._check_call()
        self._save_deferred()
        self._saves.wait_idle()
        self._saves.check()

    def close(self) -> None:
        """Wait for the saves in flight, and end the writer process. Every rank calls this; an end of the interpreter does as well. In
        a fork of the process that made this it does nothing."""
        if os.getpid() != self._pid:
            return
        try:
            self.wait()
        finally:
            self._is_closed = True
            self._saves.close()

    def _defer(self, progress: Progress, metrics: Mapping[str, float], told: str) -> None:
        if self._ranks.rank == 0:
            logger.info("save() inside %s; the save is deferred to the boundary", told)
        is_new, self._deferred = self._deferred is None, (progress, metrics)
        if is_new:
            self._members.before_forward(self._save_deferred)

    @in_neutral_surroundings
    def _save_deferred(self) -> bool:
        """Whether nothing is deferred any more. Called before each forward while something is."""
        if self._deferred is not None and not self._members.pending():
            self.save(*self._deferred)
        return self._deferred is None

    def _hand_over(self, plan: GlobalPlan, shards: list[Shard], take: Callable[[process.Plan, list[torch.Tensor]], None]) -> None:
        """Through DCP, which plans and resolves: ``take`` gets this rank's files as laid out, and the live tensors for them."""

        taken = False

        def sink(layout: ShardLayout, views: list[torch.Tensor]) -> None:
            nonlocal taken
            taken = True
            if self._orders is None or self._orders[0] is not plan:
                self._orders = (plan, process.Plan(layout, plan.listed, self._members.aliases()))
            take(self._orders[1], views)

        self._writer.begin(plan.numbers, plan.classes, sink, plan.has_frozen)
        dcp.save(shards, self._writer, plan.planner)
        if not taken:
            raise UsageError("torch.distributed.checkpoint.save returned without writing: it is patched, or of a release that is not known here")

    def _plan_of(self, shards: list[Shard]) -> GlobalPlan:
        return self._plans.plan(shards, self._members.frozen(), self._count)

    def _capture(self, progress: Progress, metrics: Mapping[str, float]) -> _Captured:
        self._capture_objects()
        if self._spoiled:
            raise UsageError(
                f"loading {self._spoiled} failed halfway, so the live state is inconsistent. Resume from a valid checkpoint before saving"
            )
        if self._ranks.rank == 0 and self._count < _LOOKS:
            self._members.report_unlisted()
        plain = self._history.take_in(progress, metrics)
        self._members.note_saved(progress)
        shards, stepped = self._members.capture()
        plan = self._plan_of(shards)
        models, objects, own = self._members.records()
        alike = {
            "are at another [epoch, step, samples]": [plain.epoch, plain.step, plain.samples],  # metrics may be a rank's own: rank 0's are kept
            "have other tensors, shapes or layouts": plan.digest,
            "have other optimizer settings, schedules or counters": digest(encode_record(models)),
            "have another state of " + " and ".join(objects): digest(encode_record(objects)),
        }
        record = {
            "progress": self._history.record(plain),
            "models": models,
            "objects": objects,
            "per_rank": sorted(own),
            "config": self._config,
            "environment": numerics.environment(),
        }
        own_record = encode_record({"rng": capture_rng(), "objects": own, "extra": self._members.extra()})
        return _Captured(
            plain,
            shards,
            stepped,
            {name: pack_record(part, name) for name, part in record.items()},
            own_record,
            alike,
            self._digests(plan, shards),
            plan,
        )

    def _digests(self, plan: GlobalPlan, shards: list[Shard]) -> Digests:
        if self._ranks.world_size == 1:
            return Digests()
        return self._comparison.digests(shards, plan.shared, plan.turns, self._count)

    def _manifest(self, captured: _Captured, attempt: str, indexes: Sequence[IndexEntry], size_bytes: int) -> Manifest:
        progress, plan, monitor = captured.progress, captured.plan, self._monitor
        if self._lineage is None:
            self._lineage = catalog.lineage_after(self._storage, None, _line_name())
        summary = Summary(
            engine=self._members.engine,
            world_size=self._ranks.world_size,
            epoch=progress.epoch,
            step=progress.step,
            samples=progress.samples,
            created=time.time(),
            attempt=attempt,
            lineage=self._lineage,
            metrics=progress.metrics,
            monitor=monitor.metric if monitor else "",
            mode=monitor.mode if monitor else "",
            best_step=progress.best.step if progress.best else -1,
            tensors=len(plan.listed),
            size_bytes=size_bytes,
        )
        return Manifest(summary, plan.listed, self._members.aliases(), tuple(indexes), encode_packed(captured.record))

    # ------------------------------------------------------------------ load

    @in_neutral_surroundings
    def resume(
        self,
        what: str = LATEST,
        *,
        missing: Missing = "error",
        corrupt: Corrupt = "previous",
        override: Sequence[str] = (),
        extend_rows: Mapping[str, str] | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        allow_cast: Sequence[str] = (),
        allow_resize: Sequence[str] = (),
        allow_changed: Sequence[str] = (),
        verify: Verify = "sample",
    ) -> Progress:
        """Restore all members from a checkpoint and return how far it had come. Every rank calls this.

        Args:
            what: ``latest``, ``best``, ``epoch:N``, ``step:N``, or the path of a step or of another run.
            missing: where the run has no checkpoint at all: raise, or start ``fresh``, with a warning that says where it was looked for.
            corrupt: where ``latest`` is damaged: take the newest sound one before it, with a warning, or raise. A step that was
                asked for by name is never replaced.
            override: hyper-parameters and settings of schedules, such as ``"lr"`` or ``"T_max"``, of which this run's values win over
                the checkpoint's. Every difference is reported.
            extend_rows: by pattern over parameters' names, what rows beyond the checkpoint's become, see
                :class:`~engine.plan.match.Allow`; as are ``allow_missing``, ``allow_unexpected``, ``allow_cast``, ``allow_resize`` and
                ``allow_changed``.
            verify: the live state is captured again after the resume and compared with the checkpoint: all values that are not tensors,
                and of the tensors a ``sample`` or ``all``; with ``off``, nothing.

        Names, shapes and dtypes are compared before anything changes; members that are not models, schedulers and extra state are
        restored before any weight changes. An error after that says that the live state is partly overwritten.
        """
        allow = Allow(allow_missing, allow_unexpected, allow_cast, extend_rows or {}, allow_resize, allow_changed)
        for name, word, choices in (("missing", missing, Missing), ("corrupt", corrupt, Corrupt), ("verify", verify, Verify)):
            one_of(name, word, choices)
        override = words("override", override)
        self.wait()
        self._saves.lease, found = self._ranks.first("find the checkpoint", lambda: [self._take(), self._find(what, missing)])
        if found is None:
            progress = Progress()
            self._members.follow(progress)
            return progress
        with _collector_paused():
            progress = self._resume_soundest(found[0], found[1], what, corrupt, (allow, override, verify))
        self._collect()
        return progress

    def _resume_soundest(self, root: str, folder: str, what: str, corrupt: Corrupt, how: tuple[Allow, Sequence[str], Verify]) -> Progress:
        while True:
            try:
                return self._resume(root, folder, *how)
            except CheckpointCorrupt as e:
                if what != LATEST or corrupt == "error":
                    raise
                damaged, told = folder, str(e)
                earlier = self._ranks.first("find an earlier checkpoint", lambda: catalog.previous(self._storage, damaged))  # noqa: B023
                if earlier is None:
                    raise
                folder = earlier
                if self._ranks.rank == 0:
                    logger.warning("%s IS DAMAGED and is passed over; going back to %s. What was found: %s", damaged, earlier, told)

    def _take(self) -> str:
        """Take the run for this job, on rank 0, before a step is looked for: what an earlier job's orphan still commits is then seen, or
        fails. Returns the lease's name; none where there is no run yet, it cannot be written, or this job only reads."""
        root = self._storage.root
        if self._read_only or not os.path.isdir(root):
            return ""
        if not os.access(root, os.W_OK):
            logger.warning("%s cannot be written: it is resumed, but saves into it will fail", root)
            return ""
        return self._saves.take()

    def _find(self, what: str, missing: Missing) -> list[str] | None:
        try:
            storage, folder = catalog.find(self._storage.root, what, names=self._names)
        except CheckpointNotFound as e:
            if missing == "error" or what != LATEST:
                raise
            logger.warning("STARTING FRESH: %s", e)
            return None
        return [storage.root, folder]

    def _resume(self, root: str, folder: str, allow: Allow, override: Sequence[str], verify: Verify) -> Progress:
        began, ranks = time.perf_counter(), self._ranks
        stored = self._open(root, folder)
        load = Loading(self._members, stored, allow, override, ranks.rank, ranks.world_size)
        ranks.gather("compare the checkpoint with this run", load.compare)
        if load.has_surroundings:
            self._restore_members(load)
        self._spoiled = str(stored.where)
        try:
            shared = any(ranks.gather("plan the reads", load.plan))
            with process_group(ranks.timeout_seconds) if shared else contextlib.nullcontext() as group:
                bytes_read = sum(ranks.gather("read the shards", lambda: load.fill(group)))
            ranks.gather("restore counters and hyper-parameters", load.restore)
            ranks.gather("derive the weights from their masters", self._members.publish)
            self._capture_objects()
            ranks.gather("compare what was restored with the checkpoint", lambda: self._prove(load, verify))
            ranks.gather("restore the random state", lambda: self._go_on(load, root, folder))
        except EngineError as e:
            raise type(e)(f"{e}\n{_PARTLY}") from e
        except Exception as e:
            e.add_note(_PARTLY)
            raise
        self._loaded, self._spoiled = (stored, load.stored_names), ""
        self._saves.committed = folder if os.path.realpath(root) == os.path.realpath(self._storage.root) else ""
        if ranks.rank == 0:
            load.tell(self._config, bytes_read, time.perf_counter() - began)
        return load.progress

    def _restore_members(self, load: Loading) -> None:
        """What a member's own code may refuse comes first: no weight has changed yet."""
        ranks = self._ranks
        shared = any(ranks.gather("plan the reads of members", load.plan_members))
        with process_group(ranks.timeout_seconds) if shared else contextlib.nullcontext() as group:
            ranks.gather("read the members", lambda: load.fill_members(group))
        try:
            ranks.gather("restore the members", load.restore_members)
        except BaseException as e:
            done = ", ".join(load.restored)
            if done:
                self._spoiled = str(load.stored.where)
            e.add_note(f"No weight has changed. {f'Restored before the failure: {done}' if done else 'Nothing else has changed either'}")
            raise

    def _prove(self, load: Loading, verify: Verify) -> None:
        """Capture again what was restored, as the next save will, and compare it with the checkpoint."""
        self._plans.note_resume(self._count)
        if self._max_in_flight:
            self._prepare()
        load.prove(self._members.capture()[0], verify)

    def _open(self, root: str, folder: str) -> StoredCheckpoint:
        """Every rank opens the same manifest: their digests are compared."""
        opened: list[StoredCheckpoint] = []

        def read() -> bytes:
            opened.append(StoredCheckpoint(LocalStorage(root), folder))
            return opened[0].digest

        if len(set(self._ranks.gather("open the checkpoint", read))) > 1:
            raise PeerError(f"the ranks see different manifests in {root}/{folder}; is the folder on storage that all of them share?")
        return opened[0]

    def _go_on(self, load: Loading, root: str, folder: str) -> None:
        """The last of a resume: the line of training and the history that saves go on, then random state."""
        self._history.adopt(load.progress)
        self._members.follow(load.progress, load.restored)
        if self._ranks.rank == 0:
            own_run = os.path.realpath(root) == os.path.realpath(self._storage.root)
            self._lineage = catalog.lineage_after(self._storage, folder if own_run else None, _line_name())
        self._restore_rng(load)

    def _restore_rng(self, load: Loading) -> None:
        try:
            rng, own = load.random_state()
            if own:
                restore_rng(rng)
                return
            derive_rng(rng["seed"], load.progress.step, self._ranks.rank)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise CheckpointCorrupt(f"{load.stored.where}: the random state of a rank is not as this version writes it: {e!r}") from e
        if self._ranks.rank == 0:
            logger.info("resumed at another world size: random state is derived anew from the saved seed")

    @in_neutral_surroundings
    def max_difference(self) -> float:
        """The largest |live − stored| over all tensors of the models in the checkpoint that was resumed last: 0.0 right after a resume.

        Reads the shard files with the safetensors package, not with our reader. Every rank calls this. Tensors that were
        converted are compared with the converted value.
        """
        if self._loaded is None:
            raise UsageError("max_difference() compares with the checkpoint that was resumed; resume one first")
        stored, names = self._loaded

        def compare() -> float:
            pairs = [(shard, names.get(shard.name, shard.name)) for shard in self._members.model_shards()]
            found = differences(stored, [(shard, name) for shard, name in pairs if name in stored.tensors], self._ranks.rank)
            return max(found.values(), default=0.0)

        return max(self._ranks.gather("compare with the stored files", compare))


_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()
"""Of this process."""


def _step_of(progress: Progress) -> int:
    """The step, of whatever integer type; 0 for what is none, which is refused as the state is captured, on all ranks."""
    try:
        return max(0, operator.index(progress.step))
    except (TypeError, AttributeError):
        return 0


def _line_name() -> str:
    return os.urandom(6).hex()


_OPTIONS = tuple(name for name, p in inspect.signature(Checkpointer.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY)
