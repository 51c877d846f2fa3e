"""Save and load, told in order. Each step of the two pipelines is a call into the room that knows it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from engine import catalog, dcp
from engine.catalog import Retention
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, PeerError, UsageError
from engine.format.checksum import digest
from engine.format.layout import LogicalTensor
from engine.format.manifest import IndexEntry, Line, Manifest, Summary
from engine.format.names import LATEST, step_name
from engine.format.record import encode_record
from engine.loading import Loading
from engine.plan.assign import assign_writers
from engine.plan.match import Allow
from engine.plan.order import reading_order
from engine.state.members import Members
from engine.state.progress import Monitor, Progress, capture_rng, derive_rng, restore_rng
from engine.state.shard import Shard
from engine.storage import LocalStorage
from engine.sync import compare, current_ranks
from engine.transfer import replicas
from engine.transfer.commit import abort_attempt, begin_attempt, commit_attempt, write_run_file
from engine.transfer.compare import differences
from engine.transfer.exchange import process_group
from engine.transfer.stored import StoredCheckpoint

logger = logging.getLogger("engine")

Missing = Literal["error", "warn", "fresh"]
Corrupt = Literal["error", "previous"]
Names = Literal["tolerate", "refuse"]

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
class _Plan:
    """What all ranks agreed on: the logical tensors with their writers, and the digest that was compared. ``listed`` are the same
    in the manifest's order, with the number and the geometry class of each; ``shared`` are the places of replicated ones."""

    described: tuple[LogicalTensor, ...]
    assigned: tuple[LogicalTensor, ...]
    digest: bytes
    listed: tuple[LogicalTensor, ...]
    numbers: Mapping[str, int]
    classes: Sequence[int]
    shared: Sequence[int]
    planner: dcp.ShardSavePlanner


@dataclass(frozen=True)
class _Captured:
    """One save's state: live shards, and everything that is not a tensor: shared by all ranks, and this rank's own. ``alike`` must be
    the same on all ranks, as must the tensors at the places ``compared``."""

    progress: Progress
    shards: list[Shard]
    record: bytes
    own_record: bytes
    alike: dict[str, Any]
    compared: list[int]
    plan: _Plan


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
        keep_last, keep_every, keep_best: which steps stay, see :class:`~engine.catalog.Retention`; without ``keep_last`` all do.
        monitor, mode: the metric that decides which step is ``best``, and whether that is the smallest (``min``) or largest (``max``).
        replicas: how much of what several ranks hold alike is compared between them at each save: ``all``, a ``sample`` that goes
            round, or ``off``.
        names: whether folders with invalid step names in the run are tolerated on resume, or refused.
        timeout_seconds: how long ranks wait for each other before all of them raise :class:`~engine.errors.PeerError`.

    A model is a DeepSpeed engine, a ``nn.Module``, or a tuple ``(module, optimizer)`` or ``(module, optimizer, scheduler)``.

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
        monitor: str | None = None,
        mode: str = "min",
        replicas: replicas.Replicas = "sample",
        names: Names = "tolerate",
        timeout_seconds: float = 600.0,
        **members: Any,
    ) -> None:
        self._storage = LocalStorage(run)
        self._config = dict(config or {})
        self._retention = Retention(keep_last, keep_every, keep_best)
        self._monitor = Monitor(monitor, mode) if monitor is not None else None
        self._replicas = replicas
        self._names: Names = names
        self._ranks = current_ranks(timeout_seconds)
        self._ranks.agree("attach", lambda: self._attach(model, members))
        self._writer = dcp.ShardWriter(self._storage, self._ranks.rank)
        self._plan: _Plan | None = None
        self._lineage: tuple[Line, ...] | None = None  # on rank 0: from a resume, or the first save, on
        self._saves = 0
        self._spoiled = ""
        self._loaded: tuple[StoredCheckpoint, dict[str, str]] | None = None

    def _attach(self, model: Any, members: Mapping[str, Any]) -> dict[str, Any]:
        """Check that this rank holds what the layout rules say; that all ranks have the same rules is for the caller."""
        self._members = Members(model, members, self._ranks.rank)
        described = [shard.tensor for shard in self._members.model_shards()]
        return {"have other tensors, shapes or layouts": digest(msgspec.msgpack.encode(described))}

    # ------------------------------------------------------------------ save

    @_collector_paused()
    def save(self, progress: Progress, metrics: Mapping[str, float] | None = None) -> str:
        """Write a checkpoint of all members as step ``progress.step``; returns its folder when it is durable and visible.

        ``metrics`` enter ``progress.metrics`` and ``progress.history``; the monitored one moves ``progress.best``.

        Every rank calls this, at an optimizer-step boundary. If one rank fails, all raise and what was committed before stays as it
        was; the new step is not visible, unless the failure came after its rename (moving ``latest``), which the message then says.
        A step that exists is replaced. Then steps that retention does not keep are deleted.
        """
        began = time.perf_counter()
        captured = self._plan_save(progress, metrics or {})
        attempt = self._ranks.first("begin the save", lambda: self._begin(captured.progress.step))
        try:
            written = self._ranks.collect("write the shards", lambda: self._write(attempt, captured))
            self._ranks.first("commit", lambda: self._commit(attempt, captured, written))
        except BaseException:
            if self._ranks.rank == 0:
                abort_attempt(self._storage, attempt)
            raise
        progress.take(captured.progress)
        saved = step_name(captured.progress.step)
        if self._ranks.rank == 0:
            self._clean_up(saved, captured.progress)
        self._saves += 1
        seconds = time.perf_counter() - began
        logger.info("saved %s: %.1f MB by this rank in %.2f s", saved, self._writer.bytes_written / 1e6, seconds)
        return f"{self._storage.root}/{saved}"

    def _plan_save(self, progress: Progress, metrics: Mapping[str, float]) -> _Captured:
        """Capture live shards and the records; all ranks compare what must be the same. The last plan serves while tensors stay
        alike."""
        captured: list[_Captured] = []

        def capture() -> dict[str, Any]:
            captured.append(self._capture(progress, metrics))
            now = captured[0]
            return {"alike": now.alike, "shared": replicas.digests(now.shards, now.compared, self._ranks.rank)}

        def conclude(reports: list[dict[str, Any]]) -> list[str]:
            compare([report["alike"] for report in reports])
            return replicas.drifted([report["shared"] for report in reports])

        drifted = self._ranks.round("agree on the save", capture, conclude)
        if drifted:
            now, rank = captured[0], self._ranks.rank
            details = lambda: replicas.details(now.shards, now.compared, rank, drifted)  # noqa: E731
            self._ranks.round("compare replicas", details, replicas.name_the_drift)
        return captured[0]

    def _capture(self, progress: Progress, metrics: Mapping[str, float]) -> _Captured:
        if self._spoiled:
            raise UsageError(f"loading {self._spoiled} failed halfway, so the live state is no run's. Resume from a sound checkpoint before saving")
        plain = progress.plain(metrics, self._monitor)
        shards = self._members.capture()
        described = tuple(shard.tensor for shard in shards)
        if self._plan is None or self._plan.described != described:
            self._plan = _make_plan(described, self._ranks.rank)
        models, objects, own = self._members.records()
        alike = {
            "are at another [epoch, step, samples]": [plain.epoch, plain.step, plain.samples],  # metrics may be a rank's own: rank 0's are kept
            "have other tensors, shapes or layouts": self._plan.digest,
            "have other optimizer settings, schedules or counters": digest(encode_record(models)),
            "have another state of " + " and ".join(objects): digest(encode_record(objects)),
        }
        record = {"progress": msgspec.to_builtins(plain), "models": models, "objects": objects, "per_rank": sorted(own), "config": self._config}
        compared = list(self._plan.shared) if self._ranks.world_size > 1 and self._replicas != "off" else []
        if self._replicas == "sample":
            compared = replicas.sample(shards, compared, self._saves)
        return _Captured(plain, shards, encode_record(record), encode_record({"rng": capture_rng(), "objects": own}), alike, compared, self._plan)

    def _begin(self, step: int) -> str:
        attempt = begin_attempt(self._storage, step)
        if self._lineage is None:
            self._lineage = catalog.lineage_after(self._storage, None, _line_name())
        return attempt

    def _write(self, attempt: str, captured: _Captured) -> list[Any]:
        """This rank's files; returns its index's size and digest, and the bytes of all."""
        plan = captured.plan
        self._writer.begin(attempt, plan.numbers, plan.classes, captured.own_record)
        dcp.save(captured.shards, self._writer, plan.planner)
        assert self._writer.index_entry is not None
        return [self._writer.index_entry.size_bytes, self._writer.index_entry.digest, self._writer.bytes_written]

    def _commit(self, attempt: str, captured: _Captured, written: Sequence[Any]) -> None:
        write_run_file(self._storage, self._config, captured.progress.wandb_run_id)
        commit_attempt(self._storage, attempt, self._manifest(captured, attempt, written))

    def _manifest(self, captured: _Captured, attempt: str, written: Sequence[Any]) -> Manifest:
        progress, plan, monitor = captured.progress, captured.plan, self._monitor
        assert self._lineage is not None
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
            size_bytes=sum(size_bytes for *_, size_bytes in written),
        )
        return Manifest(summary, plan.listed, self._members.aliases(), tuple(IndexEntry(*entry[:2]) for entry in written), captured.record)

    def _clean_up(self, saved: str, progress: Progress) -> None:
        """After a commit, on rank 0: ``best``, what retention does not keep, and once what killed saves have left. A refusal of the
        storage is told, and left for the next save: the checkpoint itself is safe."""
        try:
            if progress.best is not None and catalog.is_on_line(self._storage, best := step_name(progress.best.step), saved):
                catalog.point_best(self._storage, best)
            for name in catalog.expired(catalog.summaries(self._storage), saved, self._retention) if self._retention.last else []:
                catalog.delete_step(self._storage, name)
            if self._saves == 0:
                catalog.sweep(self._storage)
        except (EngineError, OSError) as e:
            logger.warning("clearing up %s: %s", self._storage.root, e)

    # ------------------------------------------------------------------ load

    @_collector_paused()
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
    ) -> Progress:
        """Restore all members from a checkpoint and return how far it had come. Every rank calls this.

        Args:
            what: ``latest``, ``best``, ``epoch:N``, ``step:N``, or the path of a step or of another run.
            missing: where the run has no checkpoint at all: raise, or start fresh with or without a warning.
            corrupt: where ``latest`` is damaged: take the newest sound one before it, with a warning, or raise. A step that was
                asked for by name is never replaced.
            override: hyper-parameters, such as ``"lr"``, of which this run's values win over the checkpoint's.
            extend_rows: by pattern over parameters' names, what rows beyond the checkpoint's become, see
                :class:`~engine.plan.match.Allow`; as are ``allow_missing``, ``allow_unexpected``, ``allow_cast``.

        Names, shapes and dtypes are compared before anything changes. An error after that says that the live state is partly
        overwritten.
        """
        allow = Allow(allow_missing, allow_unexpected, allow_cast, extend_rows or {})
        found = self._ranks.first("find the checkpoint", lambda: self._find(what, missing))
        if found is None:
            return Progress()
        root, folder = found
        while True:
            try:
                return self._resume(root, folder, allow, override)
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

    def _find(self, what: str, missing: Missing) -> list[str] | None:
        with contextlib.suppress(EngineError, OSError):  # a run that cannot be written can still be read
            catalog.restore(self._storage)
        try:
            storage, folder = catalog.find(self._storage.root, what, names=self._names)
        except CheckpointNotFound as e:
            if missing == "error" or what != LATEST:
                raise
            logger.log(logging.WARNING if missing == "warn" else logging.INFO, "starting fresh: %s", e)
            return None
        return [storage.root, folder]

    def _resume(self, root: str, folder: str, allow: Allow, override: Sequence[str]) -> Progress:
        began, ranks = time.perf_counter(), self._ranks
        stored = self._open(root, folder)
        load = Loading(self._members, stored, allow, override, ranks.rank, ranks.world_size)
        ranks.gather("compare the checkpoint with this run", load.compare)
        self._spoiled = str(stored.where)
        try:
            shared = any(ranks.gather("plan the reads", load.plan))
            with process_group(ranks.timeout_seconds) if shared else contextlib.nullcontext() as group:
                bytes_read = sum(ranks.gather("read the shards", lambda: load.fill(group)))
            ranks.gather("restore counters and hyper-parameters", load.restore)
            ranks.gather("derive the weights from their masters", self._members.publish)
            ranks.gather("restore the random state", lambda: self._go_on(load, root, folder))
        except EngineError as e:
            raise type(e)(f"{e}\n{_PARTLY}") from e
        except Exception as e:
            e.add_note(_PARTLY)
            raise
        self._loaded, self._spoiled = (stored, load.stored_names), ""
        if ranks.rank == 0:
            load.tell(self._config, bytes_read, time.perf_counter() - began)
        return load.progress

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
        """The last of a resume: the line of training that saves go on, then random state."""
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

    def close(self) -> None:
        """Nothing is in flight: saves are durable when they return."""


def _line_name() -> str:
    return os.urandom(6).hex()


def _make_plan(described: tuple[LogicalTensor, ...], rank: int) -> _Plan:
    names = [tensor.name for tensor in described]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"two tensors are both called {twice[0]}; give members other names")
    assigned = assign_writers(described)
    order, classes = reading_order(assigned)
    listed = tuple(assigned[place] for place in order)
    numbers = {tensor.name: number for number, tensor in enumerate(listed)}
    planner = dcp.ShardSavePlanner(assigned, rank)
    return _Plan(described, assigned, digest(msgspec.msgpack.encode(listed)), listed, numbers, classes, replicas.shares(described), planner)
