"""One load under way: what of a checkpoint goes where. Compare first, which changes nothing; then plan; fill; restore the rest."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import msgspec
import torch

from engine import dcp, numerics
from engine.errors import CheckpointCorrupt, EngineError, IncompatibleCheckpoint, LayoutError
from engine.format.layout import REPLICATED, Absent, Grid, LogicalTensor, Mesh, Part
from engine.format.record import decode_record
from engine.plan.match import Allow, Match, allowed, match, match_names
from engine.plan.reads import RUN_BYTES
from engine.proof import Sample, Verify, unequal
from engine.state.boxes import part_box
from engine.state.carried import LoadedTensors
from engine.state.member import Targets
from engine.state.members import Members
from engine.state.objects import ObjectMember
from engine.state.places import Places
from engine.state.progress import Progress
from engine.state.schema import Own, Shared
from engine.state.shard import Shard, torch_dtype
from engine.state.values import references, shown
from engine.transfer.stored import StoredCheckpoint

logger = logging.getLogger("engine")


@contextmanager
def _taking_over(what: str) -> Iterator[None]:
    """A record may hold a value of a type that nobody expects where it is: then this raises :class:`IncompatibleCheckpoint`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as e:
        raise IncompatibleCheckpoint(f"{what} cannot be taken over by this run: {type(e).__name__}: {e}") from e


def _guarded(act: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(act)
    def run(self: "Loading", *arguments: Any) -> Any:
        with _taking_over(f"the state in {self.stored.where}"):
            return act(self, *arguments)

    return run


class Loading:
    """Raises :class:`CheckpointCorrupt` for a record that is not one of ours."""

    def __init__(self, members: Members, stored: StoredCheckpoint, allow: Allow, override: Sequence[str], rank: int, world_size: int) -> None:
        self.stored, self.stored_names = stored, dict[str, str]()
        self._members, self._allow, self._override = members, allow, override
        self._rank, self._world_size, self._saved_on = rank, world_size, stored.manifest.summary.world_size
        record = decode_record(stored.manifest.record)
        try:
            self.progress: Progress = msgspec.convert(record, Shared).progress
            self.progress.check()
        except (msgspec.ValidationError, ValueError) as e:
            raise CheckpointCorrupt(f"{stored.where}: its state record is not as this version writes it: {e}") from e
        head, said = stored.manifest.summary, self.progress
        if (head.epoch, head.step, head.samples) != (said.epoch, said.step, said.samples):
            raise CheckpointCorrupt(f"{stored.where}: its state record is of step {said.step}, its head of step {head.step}, or not as far")
        self._models: dict[str, Any] = record["models"]
        self._objects: dict[str, Any] = record["objects"]
        self._per_rank: list[str] = record["per_rank"]
        self.config: dict[str, Any] = record["config"]
        self._environment: dict[str, Any] = record.get("environment", {})
        self._own: dict[str, Any] | None = None
        self._targets = Targets([], [])
        self._matched = Match()
        self._object_tensors: dict[str, LoadedTensors] = {}
        self._pairings: list[dcp.Pairing] = []
        self._load: dcp.ShardLoad
        self._bytes_read = 0
        self._news: list[str] = []
        self._told: list[str] = []
        self._sample: Sample | None = None
        self.restored: list[str] = []
        """Of the members that are not models, those restored so far."""

    @_guarded
    def compare(self) -> None:
        """Names, shapes and dtypes, and whether the optimizers can hold the state. Changes nothing live."""
        stored, models = self.stored, self._members.models
        if self._rank == 0:
            stored.check_backed()
        extra = self._own_record().get("extra", {})
        may_resize = partial(allowed, patterns=self._allow.resize)
        self._targets = targets = self._members.targets(stored.tensors, stored.manifest.aliases, self._models, extra, may_resize)
        self.stored_names = targets.stored_names
        found = self._compare_objects()
        early = [shard.tensor for _, shard in targets.early.values()]
        live = [shard.tensor for shard in targets.tensors] + targets.states + early + found
        read_apart = [self.stored_names.get(shard.name, shard.name) for shard in targets.scalars]
        self._matched = match(live, stored.tensors, self.stored_names, self._allow, [*read_apart, *targets.empty, *self._left_out(live)])
        scalars = [dcp.Pairing(shard, stored.tensors[self.stored_names.get(shard.name, shard.name)]) for shard in targets.scalars]
        if scalars:  # a few bytes, which every rank reads by itself
            self._bytes_read = dcp.load(scalars, stored, self._rank, self._world_size)
        for name, member in models.items():
            self._told += member.check_load(self._override)
            here, there = member.check_extra()
            base = f"{name}.extra" if name else "extra"
            match_names((f"{base}.{key}" for key in here), (f"{base}.{key}" for key in there), self._allow, "extra state of modules")

    def _left_out(self, live: Iterable[LogicalTensor]) -> list[str]:
        """Stored tensors that have no place here, and need none: of members that are left out, and of a rank's own state on others."""
        names = {tensor.name for tensor in live}
        gone = [name for member in self._objects.keys() - self._object_tensors.keys() for name in references(self._objects[member])]
        own = tuple(f"{name}.rank_" for name in self._per_rank)
        extra = tuple(f"{name}.extra." if name else "extra." for name in self._members.models)
        return gone + [name for name in self.stored.tensors if name not in names and name.startswith((*own, *extra))]

    def _compare_objects(self) -> list[LogicalTensor]:
        """Which objects are restored from what, and the tensors they have made for it."""
        members, allow = self._members.objects, self._allow
        match_names(members, [*self._objects, *self._per_rank], allow)
        if self._per_rank and self._world_size != self._saved_on:
            lost = [name for name in self._per_rank if name in members]
            try:
                match_names(lost, [], allow)
            except IncompatibleCheckpoint:
                raise IncompatibleCheckpoint(
                    f"the members {lost} have a state of each rank's own, saved on {self._saved_on} ranks; here are {self._world_size}. "
                    "Resume on as many, or let them start fresh with allow_missing"
                ) from None
        elif self._per_rank:
            self._objects = {**self._objects, **self._own_record()["objects"]}
        meshes = self._members.meshes()
        for name, member in members.items():
            if name in self._objects and self._is_restored(member, self._objects[name]):
                member.check(self._objects[name])
                self._object_tensors[name] = member.targets(self._objects[name], self.stored.tensors, meshes)
        return [shard.tensor for tensors in self._object_tensors.values() for _, shard in tensors.values()]

    def _is_restored(self, member: ObjectMember, plain: Any) -> bool:
        """Whether a member takes its stored state: not where either side has none, as a disabled grad scaler, and that is allowed.

        Raises :class:`IncompatibleCheckpoint` where it is not.
        """
        name, kind = member.name, type(member.target).__name__
        here, there = member.has_state(), plain != {}
        if here == there:
            return there
        if there and not allowed(name, self._allow.unexpected):
            raise IncompatibleCheckpoint(
                f"member '{name}' ({kind}) has no state here (is it disabled?), but has in the checkpoint; allow_unexpected=[{name!r}] leaves it out"
            )
        if here and not allowed(name, self._allow.missing):
            raise IncompatibleCheckpoint(
                f"member '{name}' ({kind}) had no state when the checkpoint was saved (was it disabled?), but has here; allow_missing=[{name!r}] "
                "lets it start fresh"
            )
        self._told.append(f"member '{name}' " + ("starts fresh" if here else "is left out") + ", as allowed")
        return False

    def _own_record(self) -> dict[str, Any]:
        """What the rank of the same number (rank 0 where the world size differs) had for itself: random state, per-rank members."""
        if self._own is None:
            writer = self._rank if self._world_size == self._saved_on else 0
            self._own = decode_record(self.stored.index(writer).record())
            try:
                msgspec.convert(self._own, Own)
            except msgspec.ValidationError as e:
                raise CheckpointCorrupt(f"{self.stored.where}: the record of rank {writer} is not as this version writes it: {e}") from e
        assert self._own is not None
        return self._own

    @property
    def has_surroundings(self) -> bool:
        """Whether there are members that are not models, schedulers, or extra state: the same on all ranks."""
        return bool(self._members.objects) or any(member.has_surroundings for member in self._members.models.values())

    def plan_members(self) -> bool:
        """Find in the indexes the tensors of what is restored before any weight changes; returns whether ranks need what others read."""
        shards = [shard for tensors in self._object_tensors.values() for _, shard in tensors.values()]
        shards += [shard for _, shard in self._targets.early.values()]
        pairs = self._matched.pairs
        self._load = dcp.ShardLoad([self._pairing(s, pairs[s.name]) for s in shards if s.name in pairs], self.stored, self._rank, self._world_size)
        return self._load.is_shared

    def fill_members(self, group: Any = None) -> None:
        """The tensors that :meth:`plan_members` found; ``group``: see :meth:`engine.dcp.ShardLoad.run`."""
        self._bytes_read += self._load.run(group)

    def restore_members(self) -> None:
        """Restore members that are not models, then schedulers and extra state. No weight has changed yet, so that what one of them
        refuses leaves the weights as they are."""
        device = self._members.device()
        for name, tensors in self._object_tensors.items():
            member = self._members.objects[name]
            with _taking_over(f"the stored state of member '{name}'"):
                member.restore(self._objects[name], tensors, device)
            self.restored.append(name)
            if hasattr(member.target, "seek"):
                member.target.seek(self.progress.samples)
        for name, model in self._members.models.items():
            with _taking_over(f"what is stored of {model.name}'s schedulers and extra state"):
                model.restore_surroundings()
            self.restored.append(name or "the model's schedulers and extra state")

    @_guarded
    def plan(self) -> bool:
        """Give the optimizers the states that the checkpoint has, and find in the indexes where everything is; returns whether
        ranks need what others read, so that they must exchange it."""
        shards = list(self._targets.tensors)
        for member in self._members.models.values():
            shards += member.prepare()
        pairs = self._matched.pairs
        early = {*self._targets.early, *(name for tensors in self._object_tensors.values() for name in tensors)}
        unread = pairs.keys() - {shard.name for shard in shards} - early
        if unread:
            raise LayoutError(
                f"{len(unread)} stored tensors have no live counterpart to fill, such as {min(unread)}: the optimizer keeps other states than before"
            )
        self._pairings = [self._pairing(shard, pairs[shard.name]) for shard in shards if shard.name in pairs]
        self._load = dcp.ShardLoad(self._pairings, self.stored, self._rank, self._world_size)
        return self._load.is_shared

    def fill(self, group: Any = None) -> int:
        """Everything in place; returns the bytes that this rank read. ``group``: see :meth:`engine.dcp.ShardLoad.run`."""
        bytes_read = self._bytes_read + self._load.run(group)
        for pairing in self._pairings:
            if pairing.kept_from is not None and self._matched.extended[pairing.shard.name] == "mean":
                self._fill_with_mean(pairing)
            if _has_absent(pairing.shard.tensor) or _has_absent(pairing.stored):
                self._note_absent(pairing)
        early = [shard for tensors in self._object_tensors.values() for _, shard in tensors.values()]
        early += [shard for _, shard in self._targets.early.values()]
        self._sample = Sample([*(pairing.shard for pairing in self._pairings), *early], self.stored.digest, self._rank)
        return bytes_read

    def _pairing(self, shard: Shard, stored: LogicalTensor) -> dcp.Pairing:
        extended = self._matched.extended
        kept = bool(extended) and extended.get(shard.name) in ("keep", "mean")
        return dcp.Pairing(shard, stored, self.stored.tensors[stored.name].shape[0] if kept else None)

    @torch.no_grad()
    def _fill_with_mean(self, pairing: dcp.Pairing) -> None:
        """Rows beyond the stored ones become the mean of those. Every rank computes it alike, from the files."""
        stored, rows = self.stored.tensors[pairing.stored.name], pairing.kept_from
        assert rows is not None
        inner, alone = stored.shape[1:], Grid(Mesh((1,)), (REPLICATED,))
        total = torch.zeros(inner, dtype=torch.float64, device="cpu")
        count = max(1, RUN_BYTES * rows // max(stored.size_bytes, 1))
        for first in range(0, rows, count):
            window = torch.zeros((min(count, rows - first), *inner), dtype=torch_dtype(stored.dtype), device="cpu")
            part = Part(alone, (first, *(0 for _ in inner)), tuple(window.shape))
            dcp.load([dcp.Pairing(Shard(LogicalTensor(stored.name, stored.dtype, stored.shape, (part,)), (window,)), stored)], self.stored, 0)
            total += window.double().sum(0)
        mean = total / max(rows, 1)
        for box, view in pairing.shard.held(self._rank):
            new = box.offsets[0] + box.sizes[0] - max(rows, box.offsets[0])
            if new > 0:
                place = tuple(slice(o, o + n) for o, n in zip(box.offsets[1:], box.sizes[1:], strict=True))
                view.narrow(0, box.sizes[0] - new, new).copy_(mean[place].expand(new, *box.sizes[1:]))

    def _note_absent(self, pairing: dcp.Pairing) -> None:
        """Moments of frozen rows: what is dropped because the rows are frozen here, or filled because they were there."""
        live, stored = pairing.shard.tensor, self.stored.tensors[pairing.stored.name]
        for tensor, other, told in ((live, stored, "left out: these rows are frozen here"), (stored, live, "zero: these rows were frozen there")):
            places = Places(other)
            for part in tensor.parts:
                if isinstance(part.layout, Absent) and any(
                    not isinstance(counterpart.layout, Absent) for counterpart, _ in places.overlapping(part_box(tensor, part))
                ):
                    first = part.offsets[0] if part.offsets else 0
                    self._news.append(f"{live.name}: rows {first} to {first + part_box(tensor, part).sizes[0]} {told}")

    @_guarded
    def restore(self) -> None:
        """Everything of the models that is not a tensor; ``publish`` follows on all ranks."""
        for member in self._members.models.values():
            member.restore(self.progress.step, self.progress.samples)

    @_guarded
    def prove(self, shards: Sequence[Shard], verify: Verify) -> None:
        """Compare what was captured again after the restore, ``shards`` and records, with the checkpoint.

        Raises :class:`IncompatibleCheckpoint` naming each difference that nothing explains that was allowed or overridden.
        """
        if verify == "off":
            return
        found = [(path, shown(a), shown(b)) for path, a, b in self._explain() if not self._is_explained(path)]
        live = {shard.name: shard for shard in shards}
        pairs, objects = self._matched.pairs, self._object_shards()
        held = {name for name, shard in objects.items() if shard.locals[0] is not None}
        compared = {name for member in self._members.models.values() for name in member.carried_names()}  # which may stand in the record here
        gone = pairs.keys() - live.keys() - compared
        lost = sorted(name for name in gone if (name in held or name not in objects) and not self._is_explained(name))
        found += [(name, "a tensor", "nothing") for name in lost]
        changed = self._sample.changed(live) if self._sample is not None else []
        changed = [name for name in changed if name in live or name not in compared]
        if verify == "all":
            whole = [(live[name], stored) for name, stored in pairs.items() if name in live and name not in self._matched.extended]
            changed = unequal(self.stored, whole, self._rank)
        found += [(name, "one value", "a different one") for name in changed if name not in lost and not self._is_explained(name)]
        if found:
            lines = [f"  {path}: {theirs} in the checkpoint, {mine} after the resume" for path, theirs, mine in found[:8]]
            more = f"\n  … and {len(found) - 8} more" if len(found) > 8 else ""
            raise IncompatibleCheckpoint(
                f"rank {self._rank}: the resume of {self.stored.where} has not brought back what was saved:\n" + "\n".join(lines) + more + "\n"
                "An object that does not take over its own state does this (its load_state_dict drops or changes a value), or two that restore "
                "the same thing. allow_changed=[patterns] over these paths accepts a difference"
            )

    def _object_shards(self) -> dict[str, Shard]:
        return {name: shard for tensors in self._object_tensors.values() for name, (_, shard) in tensors.items()}

    def _explain(self) -> Iterator[tuple[str, Any, Any]]:
        for member in self._members.models.values():
            yield from member.explain(self._world_size == self._saved_on)
        for name in self._object_tensors:
            yield from self._members.objects[name].explain(self._objects[name], self._members.captured_object(name))

    def _is_explained(self, path: str) -> bool:
        allow = self._allow
        patterns = [*allow.changed, *allow.missing, *allow.unexpected, *allow.cast, *allow.resize]
        return allowed(path, patterns) or not set(path.split(".")).isdisjoint(self._override)

    def random_state(self) -> tuple[dict[str, Any], bool]:
        """What was saved of the random state, and whether it is this rank's own."""
        return self._own_record()["rng"], self._world_size == self._saved_on

    def tell(self, config: dict[str, Any], bytes_read: int, seconds: float) -> None:
        """For rank 0's log: what was loaded, and everything that is not as it was."""
        s, matched = self.stored.manifest.summary, self._matched
        logger.info(
            "resumed %s (%s on %d ranks): %.1f MB read and verified in %.2f s", self.stored.where, s.engine, s.world_size, bytes_read / 1e6, seconds
        )
        for name in sorted(config.keys() | self.config.keys()):
            if name not in config or name not in self.config or config[name] != self.config[name]:
                was, now = (repr(c[name]) if name in c else "not set" for c in (self.config, config))
                logger.info("config: %s is %s, was %s", name, now, was)
        if self._environment and (changed := numerics.differences(self._environment, numerics.environment())):
            logger.warning(
                "the numerical environment differs from the saved run's, so that last bits may: %s. See docs/reproducibility.md", "; ".join(changed)
            )
        for line in self._told:
            logger.warning("%s", line)
        for name, how in matched.extended.items():
            rows = self.stored.tensors[self.stored_names.get(name, name)].shape[0]
            logger.warning("%s: rows from %d on are new (%s)", name, rows, how)
        for line in self._news:
            logger.info("%s", line)
        for what, names in (("kept as they were", matched.missing), ("left out", matched.unexpected), ("converted", matched.cast)):
            if names:
                logger.warning("%d tensors %s, as allowed: %s%s", len(names), what, ", ".join(names[:5]), " …" if len(names) > 5 else "")


def _has_absent(tensor: LogicalTensor) -> bool:
    for part in tensor.parts:  # noqa: SIM110 - a generator a tensor costs more than the rest
        if type(part.layout) is Absent:
            return True
    return False
