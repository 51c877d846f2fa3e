"""Save and load, told in order. Each step of the two pipelines is a call into the room that knows it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from engine import catalog, dcp
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, LayoutError, PeerError, UsageError
from engine.format.checksum import digest
from engine.format.layout import LogicalTensor
from engine.format.manifest import FORMAT, IndexEntry, Manifest
from engine.format.names import LATEST, step_name
from engine.format.record import decode_record, encode_record
from engine.plan.assign import assign_writers
from engine.plan.match import Allow, Match, match, match_names
from engine.state.member import Member
from engine.state.pick import adapter_for, is_plain_state
from engine.state.progress import Progress, capture_rng, derive_rng, restore_rng
from engine.state.shard import Shard
from engine.storage import LocalStorage
from engine.sync import current_ranks
from engine.transfer.commit import abort_attempt, begin_attempt, commit_attempt, write_run_file
from engine.transfer.compare import differences
from engine.transfer.stored import StoredCheckpoint

logger = logging.getLogger("engine")

Missing = Literal["error", "warn", "fresh"]

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
    """What all ranks agreed on: the logical tensors with their writers, and the digest that was compared."""

    described: tuple[LogicalTensor, ...]
    assigned: tuple[LogicalTensor, ...]
    digest: bytes
    numbers: Mapping[str, int]
    planner: dcp.ShardSavePlanner


@dataclass(frozen=True)
class _Captured:
    """One save's state: live shards, and everything replicated that is not a tensor as an encoded record."""

    progress: Progress
    shards: list[Shard]
    record: bytes
    plan: _Plan


class Checkpointer:
    """Saves and resumes one run. Every rank makes one, and calls its methods in the same order.

    Args:
        run: the run's folder; made on the first save.
        model: the job's only model, if there is one. Its tensors are named ``model.<fqn>``, ``optim.state.<fqn>.<key>``,
            ``buffers.<name>``.
        members: further models, each with its name before its tensors' (``generator.model.<fqn>``), and any object with
            ``state_dict`` and ``load_state_dict`` whose state is plain values (a sampler).
        config: plain values describing the run, kept in ``run.json``.
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
        timeout_seconds: float = 600.0,
        **members: Any,
    ) -> None:
        self._storage = LocalStorage(run)
        self._config = dict(config or {})
        self._ranks = current_ranks(timeout_seconds)
        self._ranks.agree("attach", lambda: self._attach(model, members))
        self._writer = dcp.ShardWriter(self._storage, self._ranks.rank)
        self._plan: _Plan | None = None
        self._parent = ""
        self._spoiled = ""
        self._loaded: tuple[StoredCheckpoint, dict[str, str]] | None = None

    def _attach(self, model: Any, members: Mapping[str, Any]) -> dict[str, Any]:
        """Check that this rank holds what the layout rules say; that all ranks have the same rules is for the caller."""
        self._models: dict[str, Member] = {}
        self._others: dict[str, Any] = {}
        if model is not None:
            self._models[""] = Member("", adapter_for("model", model), self._ranks.rank)
        for name, member in members.items():
            if is_plain_state(member):
                self._others[name] = member
            else:
                self._models[name] = Member(f"{name}.", adapter_for(name, member), self._ranks.rank)
        for member in self._models.values():
            member.check()
        described = [shard.tensor for member in self._models.values() for shard in member.shards()]
        return {"have other tensors, shapes or layouts": digest(msgspec.msgpack.encode(described))}

    # ------------------------------------------------------------------ save

    @_collector_paused()
    def save(self, progress: Progress, metrics: Mapping[str, float] | None = None) -> str:
        """Write a checkpoint of all members as step ``progress.step``; returns its folder when it is durable and visible.

        Every rank calls this, at an optimizer-step boundary. If one rank fails, all raise and what was committed before stays as it
        was; the new step is not visible, unless the failure came after its rename (moving ``latest``), which the message then says.
        A step that exists is replaced.
        """
        began = time.perf_counter()
        captured = self._plan_save(progress, metrics or {})
        attempt = self._ranks.first("begin the save", lambda: begin_attempt(self._storage, captured.progress.step))
        try:
            entries = self._ranks.gather("write the shards", lambda: self._write(attempt, captured))
            manifest = self._manifest(captured, attempt, [IndexEntry(*entry) for entry in entries])
            self._ranks.first("commit", lambda: self._commit(attempt, manifest))
        except BaseException:
            if self._ranks.rank == 0:
                abort_attempt(self._storage, attempt)
            raise
        progress.metrics = captured.progress.metrics
        self._parent = step_name(captured.progress.step)
        seconds = time.perf_counter() - began
        logger.info("saved %s: %.1f MB by this rank in %.2f s", self._parent, self._writer.bytes_written / 1e6, seconds)
        return f"{self._storage.root}/{self._parent}"

    def _plan_save(self, progress: Progress, metrics: Mapping[str, float]) -> _Captured:
        """Capture live shards and the record; all ranks compare what must be the same. The last plan serves while tensors stay
        alike."""
        captured: list[_Captured] = []

        def capture() -> dict[str, Any]:
            if self._spoiled:
                raise UsageError(
                    f"loading {self._spoiled} failed halfway, so the live state is no run's. Resume from a sound checkpoint before saving"
                )
            plain = progress.plain(metrics)
            shards = [shard for member in self._models.values() for shard in member.shards()]
            described = tuple(shard.tensor for shard in shards)
            if self._plan is None or self._plan.described != described:
                self._plan = _make_plan(described, self._ranks.rank)
            models = {name: member.record() for name, member in self._models.items()}
            others = {name: other.state_dict() for name, other in self._others.items()}
            record = encode_record({"progress": msgspec.structs.asdict(plain), "models": models, "others": others, "config": self._config})
            captured.append(_Captured(plain, shards, record, self._plan))
            position = [plain.epoch, plain.step, plain.samples]  # metrics may be a rank's own: rank 0's are kept
            return {
                "are at another [epoch, step, samples]": position,
                "have other tensors, shapes or layouts": self._plan.digest,
                "have other optimizer settings, schedules or counters": digest(encode_record(models)),
                "have another state of " + " and ".join(others): digest(encode_record(others)),
            }

        self._ranks.agree("agree on the save", capture)
        return captured[0]

    def _write(self, attempt: str, captured: _Captured) -> list[Any]:
        """This rank's files; returns its index's size and digest."""
        self._writer.begin(attempt, captured.plan.numbers, encode_record({"rng": capture_rng()}))
        dcp.save(captured.shards, self._writer, captured.plan.planner)
        assert self._writer.index_entry is not None
        return [self._writer.index_entry.size_bytes, self._writer.index_entry.digest]

    def _manifest(self, captured: _Captured, attempt: str, entries: Sequence[IndexEntry]) -> Manifest:
        progress = captured.progress
        return Manifest(
            format=FORMAT,
            engine=", ".join(dict.fromkeys(member.adapter.engine for member in self._models.values())),
            world_size=self._ranks.world_size,
            epoch=progress.epoch,
            step=progress.step,
            samples=progress.samples,
            created=time.time(),
            attempt=attempt,
            parent=self._parent,
            metrics=progress.metrics,
            tensors=captured.plan.assigned,
            aliases={alias: name for member in self._models.values() for alias, name in member.aliases().items()},
            indexes=tuple(entries),
            record=captured.record,
        )

    def _commit(self, attempt: str, manifest: Manifest) -> None:
        write_run_file(self._storage, self._config)
        commit_attempt(self._storage, attempt, manifest)

    # ------------------------------------------------------------------ load

    @_collector_paused()
    def resume(
        self,
        what: str = LATEST,
        *,
        missing: Missing = "error",
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        allow_cast: Sequence[str] = (),
    ) -> Progress:
        """Restore all members from a checkpoint and return how far it had come. Every rank calls this.

        Args:
            what: ``latest``, ``epoch:N``, ``step:N``, or the path of a step or of another run.
            missing: where the run has no checkpoint at all: raise, or start fresh with or without a warning.
            allow_missing, allow_unexpected, allow_cast: see :class:`~engine.plan.match.Allow`.

        Names, shapes and dtypes are compared before anything changes. An error after that says that the live state is partly
        overwritten.
        """
        found = self._ranks.first("find the checkpoint", lambda: self._find(what, missing))
        if found is None:
            return Progress()
        began = time.perf_counter()
        stored = self._open(*found)
        load = _load(stored, Allow(allow_missing, allow_unexpected, allow_cast))
        self._ranks.gather("compare the checkpoint with this run", lambda: self._compare(load))
        self._spoiled = str(load.stored.where)
        try:
            bytes_read = sum(self._ranks.gather("read the shards", lambda: self._fill(load)))
            self._restore(load)
        except EngineError as e:
            raise type(e)(f"{e}\n{_PARTLY}") from e
        except Exception as e:
            e.add_note(_PARTLY)
            raise
        self._parent, self._loaded, self._spoiled = found[1], (load.stored, load.stored_names), ""
        self._tell(load, bytes_read, time.perf_counter() - began)
        return load.progress

    def _find(self, what: str, missing: Missing) -> list[str] | None:
        try:
            storage, folder = catalog.find(self._storage.root, what)
        except CheckpointNotFound as e:
            if missing == "error" or what != LATEST:
                raise
            logger.log(logging.WARNING if missing == "warn" else logging.INFO, "starting fresh: %s", e)
            return None
        return [storage.root, folder]

    def _open(self, root: str, folder: str) -> StoredCheckpoint:
        """Every rank opens the same manifest: their digests are compared."""
        opened: list[StoredCheckpoint] = []

        def read() -> bytes:
            opened.append(StoredCheckpoint(LocalStorage(root), folder))
            return opened[0].digest

        if len(set(self._ranks.gather("open the checkpoint", read))) > 1:
            raise PeerError(f"the ranks see different manifests in {root}/{folder}; is the folder on storage that all of them share?")
        return opened[0]

    def _compare(self, load: _Load) -> None:
        """Names, shapes and dtypes, and whether the optimizers can hold the state. Changes nothing live."""
        stored = load.stored
        for name, member in self._models.items():
            targets = member.targets(stored.tensors, stored.manifest.aliases, load.model_record(name))
            load.stored_names.update(targets.stored_names)
            load.scalars += targets.scalars
            load.tensors += targets.tensors
            load.states += targets.states
        live = [shard.tensor for shard in load.tensors] + load.states
        scalars = [load.stored_names.get(shard.name, shard.name) for shard in load.scalars]
        load.matched = match(live, stored.tensors, load.stored_names, load.allow, scalars)
        match_names(self._others, load.record["others"], load.allow)
        for name, other in self._others.items():
            if hasattr(other, "check_state_dict") and name in load.record["others"]:
                other.check_state_dict(load.record["others"][name])
        self._read(load, load.scalars)
        for member in self._models.values():
            member.check_load()

    def _fill(self, load: _Load) -> int:
        """Give the optimizers the states that the checkpoint has, then fill everything in place; returns the bytes read."""
        shards = list(load.tensors)
        for member in self._models.values():
            shards += member.prepare()
        unread = load.matched.pairs.keys() - {shard.name for shard in shards}
        if unread:
            raise LayoutError(
                f"{len(unread)} stored tensors have no live counterpart to fill, such as {min(unread)}: the optimizer keeps other states than before"
            )
        return self._read(load, [shard for shard in shards if shard.name in load.matched.pairs])

    def _read(self, load: _Load, shards: Sequence[Shard]) -> int:
        if not shards:
            return 0
        tensors, names = load.stored.tensors, load.stored_names
        return dcp.load([dcp.Pairing(shard, tensors[names.get(shard.name, shard.name)]) for shard in shards], load.stored, self._ranks.rank)

    def _restore(self, load: _Load) -> None:
        """Everything that is not a tensor; then what is derived from the masters, and random state last."""

        def restore() -> None:
            for member in self._models.values():
                member.restore(load.progress.step, load.progress.samples)
            for name, other in self._others.items():
                if name in load.record["others"]:
                    other.load_state_dict(load.record["others"][name])
                if hasattr(other, "seek"):
                    other.seek(load.progress.samples)

        def publish() -> None:
            for member in self._models.values():
                member.adapter.publish()

        self._ranks.gather("restore counters and hyper-parameters", restore)
        self._ranks.gather("derive the weights from their masters", publish)
        self._ranks.gather("restore the random state", lambda: self._restore_rng(load))

    def _restore_rng(self, load: _Load) -> None:
        rank, world_size, saved_on = self._ranks.rank, self._ranks.world_size, load.stored.manifest.world_size
        writer = rank if world_size == saved_on else 0
        try:
            rng = decode_record(load.stored.index(writer).record)["rng"]
            if world_size == saved_on:
                restore_rng(rng)
                return
            derive_rng(rng["seed"], load.progress.step, rank)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise CheckpointCorrupt(f"{load.stored.where}: the random state of rank {writer} is not as this version writes it: {e!r}") from e
        if rank == 0:
            logger.info("saved on %d ranks, resumed on %d: random state is derived anew from the saved seed", saved_on, world_size)

    def _tell(self, load: _Load, bytes_read: int, seconds: float) -> None:
        if self._ranks.rank:
            return
        m = load.stored.manifest
        logger.info(
            "resumed %s (%s on %d ranks): %.1f MB read and verified in %.2f s", load.stored.where, m.engine, m.world_size, bytes_read / 1e6, seconds
        )
        for what, names in (("kept as they were", load.matched.missing), ("left out", load.matched.unexpected), ("converted", load.matched.cast)):
            if names:
                logger.warning("%d tensors %s, as allowed: %s%s", len(names), what, ", ".join(names[:5]), " …" if len(names) > 5 else "")

    def max_difference(self) -> float:
        """The largest |live − stored| over all tensors of the checkpoint that was resumed last: 0.0 right after a resume.

        Reads the shard files with the safetensors package, not with our reader. Every rank calls this. Tensors that were
        converted are compared with the converted value.
        """
        if self._loaded is None:
            raise UsageError("max_difference() compares with the checkpoint that was resumed; resume one first")
        stored, names = self._loaded

        def compare() -> float:
            shards = [shard for member in self._models.values() for shard in member.shards()]
            pairs = [(shard, names.get(shard.name, shard.name)) for shard in shards]
            found = differences(stored, [(shard, name) for shard, name in pairs if name in stored.tensors], self._ranks.rank)
            return max(found.values(), default=0.0)

        return max(self._ranks.gather("compare with the stored files", compare))

    def close(self) -> None:
        """Nothing is in flight: saves are durable when they return."""


@dataclass
class _Load:
    """One load under way."""

    stored: StoredCheckpoint
    record: dict[str, Any]
    progress: Progress
    allow: Allow
    stored_names: dict[str, str] = field(default_factory=dict)
    scalars: list[Shard] = field(default_factory=list)
    tensors: list[Shard] = field(default_factory=list)
    states: list[LogicalTensor] = field(default_factory=list)
    matched: Match = field(default_factory=Match)

    def model_record(self, name: str) -> dict[str, Any]:
        return self.record["models"].get(name, {})


def _load(stored: StoredCheckpoint, allow: Allow) -> _Load:
    """Raises :class:`CheckpointCorrupt` for a record that is not one of ours."""
    record = decode_record(stored.manifest.record)
    try:
        return _Load(stored, record, msgspec.convert(record["progress"], Progress), allow)
    except (msgspec.ValidationError, KeyError, TypeError) as e:
        raise CheckpointCorrupt(f"{stored.where}: its state record is not as this version writes it: {e!r}") from e


def _make_plan(described: tuple[LogicalTensor, ...], rank: int) -> _Plan:
    names = [tensor.name for tensor in described]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"two tensors are both called {twice[0]}; give members other names")
    assigned = assign_writers(described)
    numbers = {name: i for i, name in enumerate(names)}
    return _Plan(described, assigned, digest(msgspec.msgpack.encode(assigned)), numbers, dcp.ShardSavePlanner(assigned, rank))
