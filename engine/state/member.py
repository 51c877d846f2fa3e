"""One model with its optimizers and schedulers, as the checkpoint sees it: shards to save, targets to fill, one record."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from msgspec.structs import replace

from engine.errors import IncompatibleCheckpoint, LayoutError, UsageError
from engine.format.layout import REPLICATED, Grid, LogicalTensor, Mesh
from engine.format.names import name_problem
from engine.state import optimizer as optim
from engine.state import scheduler as schedules
from engine.state.boxes import check_tiling
from engine.state.carried import LoadedTensors, meshes_of, targets
from engine.state.extra import ExtraState, Unlisted
from engine.state.optimizer_state import CapturedOptimizer, OptimizerState
from engine.state.parts import Held, held, join
from engine.state.plain import layout_of, local_of, world_size
from engine.state.shard import Shard, check_shard, new_tensor, torch_dtype
from engine.state.source import Adapter, Piece, Slot
from engine.state.values import differing, unflatten

logger = logging.getLogger("engine")


@dataclass
class Targets:
    """What a load fills. ``scalars`` are temporaries and come first: they decide whether the rest fits. ``tensors`` alias live
    parameters and buffers, or are new buffers. ``states`` describe the optimizers' tensors, which :meth:`Member.prepare` will make.
    ``early`` are new tensors of extra state, by stored name. ``stored_names`` maps a live name to the checkpoint's where they differ
    (tied weights). ``empty`` are stored states of parameters without elements, which an optimizer here may not have: DeepSpeed's."""

    scalars: list[Shard]
    tensors: list[Shard]
    states: list[LogicalTensor] = field(default_factory=list)
    early: LoadedTensors = field(default_factory=dict)
    stored_names: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


@dataclass
class Captured:
    """``where`` it all lay; ``pieces``: all parameters, of which ``models`` are the shards; ``stepped``: the names of tensors that only
    the optimizer's step changes; ``frozen``: parts of tensors, by name and offsets, whose parameters nobody trains; ``optimizers``: what
    lasts of each while all lies there. The rest is of the moment: ``carried`` and ``extra`` for the records, ``more`` their tensors."""

    where: list[int]
    slots: list[Slot]
    pieces: list[Piece]
    models: list[Shard]
    shards: list[Shard]
    stepped: frozenset[str]
    frozen: frozenset[tuple[str, tuple[int, ...]]]
    optimizers: list[CapturedOptimizer]
    carried: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    more: list[Shard] = field(default_factory=list)


class Member:
    """``prefix`` is empty for a job's only model, else the member's name and a dot."""

    def __init__(self, prefix: str, adapter: Adapter, rank: int) -> None:
        self.prefix = prefix
        self.adapter = adapter
        self.rank = rank
        self.optimizers = [OptimizerState(prefix, part, number) for number, part in enumerate(adapter.parts)]
        self._extra = self._list_extra()
        self._unlisted = Unlisted(adapter.module)
        self._reported_not_given = False
        self._schedules = [schedules.Schedule(scheduler) for scheduler in adapter.schedulers]
        self._load = _MemberLoad()
        self._captured: Captured | None = None
        self._watched = _AddressCache()

    @property
    def name(self) -> str:
        return f"member '{self.prefix[:-1]}'" if self.prefix else "the model"

    def _list_extra(self) -> ExtraState:
        return ExtraState(self.adapter.module, self.adapter.names, f"{self.prefix}extra")

    def check(self) -> None:
        """On attach: every rule tiles its parameter, live storage has the size the rule says, every master equals its low-precision copy,
        element by element, and all that the objects list can be saved. Raises :class:`LayoutError` or :class:`UsageError`. No
        communication."""
        self._check_storage()
        captured = self.capture()
        for name in (*(shard.name for shard in captured.shards), *self.aliases()):
            if problem := name_problem(name):
                raise UsageError(f"{self.name} has a tensor called {name[:200]!r}, {problem}; rename it")
        for shard in captured.shards:
            check_tiling(shard.tensor)
            check_shard(shard, self.rank)
        for slot in captured.slots:
            _check_copy(slot.piece, self.rank)
        for schedule in self._schedules:
            schedule.capture()

    def check_state(self) -> None:
        """Raise :class:`UsageError` for state of optimizers and modules that can be neither sharded nor carried, naming it."""
        slots = self._slots()
        for state in self.optimizers:
            state.check_state(self._of(slots, state.number))
        self._extra.capture()

    def _check_storage(self) -> None:
        """Raise :class:`UsageError` for tensors whose values are not there, or cannot be filled."""
        names = self.adapter.names
        tensors: Iterator[tuple[str, torch.Tensor]] = chain(names.parameters.items(), ((name, names.buffer(name)) for name in names.buffers))
        for name, tensor in tensors:
            if tensor.is_meta or (hasattr(tensor, "_local_tensor") and tensor._local_tensor.is_meta):  # type: ignore[attr-defined]
                raise UsageError(
                    f"{self.prefix}{name} is on the meta device: it has no storage, so values saved or loaded would go nowhere. Give the model "
                    "storage before making the Checkpointer: module.to_empty(device=...), for a buffer alone torch.empty_like(buffer, device=...)"
                )
        for name, parameter in names.parameters.items():
            if parameter.is_inference():
                raise UsageError(
                    f"{self.prefix}{name} was made inside torch.inference_mode(), so it can be neither trained nor filled. Build the model outside"
                )

    def _slots(self) -> list[Slot]:
        slots, placed = self.adapter.slots(), self.adapter.names.placed
        return [replace(slot, piece=placed(slot.piece)) for slot in slots] if self.adapter.names.places else slots

    def _others(self) -> list[Piece]:
        placed = self.adapter.names.placed
        return [placed(piece) for piece in self.adapter.others()] if self.adapter.names.places else self.adapter.others()

    def _of(self, slots: list[Slot], number: int) -> list[Slot]:
        return slots if len(self.optimizers) == 1 else [slot for slot in slots if slot.part == number]

    def shards(self) -> list[Shard]:
        """All live state that is laid out by parameter, in a stable order: parameters, optimizer state, buffers."""
        return list(self.capture().shards)

    def capture(self) -> Captured:
        """Enumerate the live state. What lay by parameter serves again while every tensor lies where it lay: enumerating 10,000 of them
        takes longer than looking whether any has moved. Raises :class:`UsageError` for what can neither be sharded nor carried."""
        if self.adapter.names.check(self.adapter.reshard):
            self._extra, self._captured = self._list_extra(), None
        where, captured = self._whereabouts(), self._captured
        if captured is not None and captured.where == where:
            refreshed = all(state.refresh(last) for state, last in zip(self.optimizers, captured.optimizers, strict=True))
        else:
            refreshed = False
        if not refreshed or captured is None:
            self._captured = captured = self._enumerate(where)
        if any(last.nested or last.loose for last in captured.optimizers) or any(state.is_whole for state in self.optimizers):
            found = [state.carried(last) for state, last in zip(self.optimizers, captured.optimizers, strict=True)]
            captured.carried, captured.more = [plain for plain, _ in found], [shard for _, shards in found for shard in shards]
        else:
            captured.carried, captured.more = [{}] * len(self.optimizers), []
        captured.extra, shards = self._extra.capture()
        captured.more += shards
        return captured

    def _enumerate(self, where: list[int]) -> Captured:
        slots, others = self._slots(), self._others()
        pieces = [*(slot.piece for slot in slots), *others]
        if len(self.optimizers) > 1:  # one inside another holds the same parameters
            pieces = list({(piece.name, piece.place.offsets if piece.place else ()): piece for piece in pieces}.values())
        models = self._model_shards(pieces)
        frozen_parts = [piece for piece in others if piece.place]
        optimizers = [state.capture(self._of(slots, state.number), frozen_parts) for state in self.optimizers]
        states = [shard for captured in optimizers for shard in captured.shards]
        hooked = {number for number, part in enumerate(self.adapter.parts) if part.has_hooks}
        if hooked and len(hooked) == len(self.adapter.parts):
            stepped = {f"{self.prefix}model.{slot.piece.name}" for slot in slots} | {shard.name for shard in states}
        else:  # a step that cannot be watched may begin before a copy has ended
            stepped = set()
        stepped -= {f"{self.prefix}model.{piece.name}" for piece in others}  # rows of one tensor, partly frozen
        fixed = {name for name, p in self.adapter.names.parameters.items() if not p.requires_grad}
        frozen = frozenset(
            (f"{self.prefix}model.{placed.name}", placed.place.offsets if placed.place else ())
            for piece in self.adapter.others()
            if piece.name in fixed
            for placed in (self.adapter.names.placed(piece),)
        )
        shards = models + states + self._buffers()
        return Captured(where, slots, pieces, models, shards, frozenset(stepped), frozen, optimizers)

    def _whereabouts(self) -> list[int]:
        """Changes when any live tensor moves, when an optimizer's are replaced, added or removed, and when one begins or ceases to be
        trained. What was captured keeps its memory, so that nothing new can lie in the place of something old."""
        a = self.adapter
        parameters = a.names.parameters.values()
        flags = list(map(_REQUIRES_GRAD, parameters))
        held: list[Any] = [getattr(p, "ds_tensor", p) for p in parameters]
        held += a.anchors()
        held += [a.module.get_buffer(raw) for raw in a.names.buffers.values()]
        for part in a.parts:
            states = [state for state in part.optimizer.state.values() if isinstance(state, dict)]
            flags.append(len(part.optimizer.state))
            flags += map(id, chain.from_iterable(group["params"] for group in part.optimizer.param_groups))
            flags += map(len, states)
            held += chain.from_iterable(state.values() for state in states)
        self._watched.look_at(held)
        return [*self._watched.addresses(), *self._watched.kinds, *flags]

    def _model_shards(self, pieces: list[Piece]) -> list[Shard]:
        """One a logical tensor; a tensor of several parameters stands where its first one does."""
        shards: dict[str, Shard | None] = {}
        parts: dict[str, list[Held]] = {}
        wholes: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            name = f"{self.prefix}model.{piece.name}"
            if piece.place is None:
                shards[name] = optim.tensor_shard(name, piece.shape, piece.layout, piece.local)
            else:
                shards[name], wholes[name] = None, piece.place.whole
                parts.setdefault(name, []).extend(held(piece.place, piece.shape, piece.layout, piece.local))
        return [shard or join(name, wholes[name], parts[name]) for name, shard in shards.items()]

    def _buffers(self, missing: Mapping[str, torch.Tensor] | None = None) -> list[Shard]:
        """Rank 0's: buffers may differ by rank (BatchNorm statistics), and one rank's must be taken together. Those in ``missing`` stand
        in the place of the module's own, which a load will replace."""
        first = Grid(Mesh((world_size(),)), (REPLICATED,), writer=0)
        found, names, new = [], self.adapter.names, dict(missing or {})
        for name in [*names.buffers, *(name for name in new if name not in names.buffers)]:
            buffer = new[name] if name in new else names.buffer(name)
            layout = first if type(buffer) is torch.Tensor else layout_of(buffer)
            found.append(optim.tensor_shard(f"{self.prefix}buffers.{name}", tuple(buffer.shape), layout, local_of(buffer)))
        return found

    def aliases(self) -> dict[str, str]:
        """Further names of tied tensors, as the checkpoint has them."""
        names = self.adapter.names
        kinds = (("model", names.aliases), ("buffers", names.buffer_aliases))
        return {f"{self.prefix}{kind}.{alias}": f"{self.prefix}{kind}.{name}" for kind, pairs in kinds for alias, name in pairs.items()}

    def record(self) -> dict[str, Any]:
        """Everything replicated that is not a tensor, as of the last :meth:`capture`."""
        captured = self._captured or self.capture()
        record: dict[str, Any] = {"engine": self.adapter.engine, "counters": self.adapter.counters()}
        found = [state.record(last, carried) for state, last, carried in zip(self.optimizers, captured.optimizers, captured.carried, strict=True)]
        if found:
            record |= found[0]
        if found[1:]:
            record["more_optimizers"] = found[1:]
        schedulers = [schedule.capture() for schedule in self._schedules]
        if schedulers:
            record["scheduler"] = schedulers[0]
        if schedulers[1:]:
            record["more_schedulers"] = schedulers[1:]
        if keys := self.adapter.names.own_keys():
            record["keys"] = keys
        if self.adapter.names.empty:
            record["empty_buffers"] = sorted(self.adapter.names.empty)
        return record

    def report_unlisted(self) -> None:
        """Report, once, what training changes in the module and its state dict does not list, and what has state and was not given."""
        self._unlisted.report(self._extra.keys)
        if not self._reported_not_given and (lines := list(self._not_given())):
            self._reported_not_given = True
            for line in lines:
                logger.warning("%s", line)

    def carried_names(self) -> set[str]:
        """Return the stored tensors that optimizers' own containers refer to, of the load under way."""
        return {name for state in self.optimizers for name in state.load.tensors}

    def _not_given(self) -> Iterator[str]:
        a = self.adapter
        trained = [name for name, p in a.names.parameters.items() if p.requires_grad and p.grad is not None]
        if trained and not a.parts:
            yield (
                f"{self.name} was given without an optimizer, though it is trained ({len(trained)} of its parameters have gradients, such as "
                f"{trained[0]}): the optimizer's state is not saved. Give (module, optimizer)"
            )
        # torch's schedulers mark the method that they count
        scheduled = [part.optimizer for part in a.parts if hasattr(getattr(part.optimizer, "step", None), "_wrapped_by_lr_sched")]
        if scheduled and not a.schedulers:
            yield (
                f"{self.name} was given without a scheduler, though one drives its {type(scheduled[0]).__name__}: its state is not saved, and a "
                "resumed run would begin its schedule again. Give (module, optimizer, scheduler)"
            )

    def extra(self) -> dict[str, Any]:
        """This rank's extra state of modules, as of the last :meth:`capture`."""
        return self._captured.extra if self._captured else {}

    # A load calls these in order: targets, check_load, restore_surroundings, prepare, restore.

    def targets(
        self,
        stored: dict[str, LogicalTensor],
        aliases: dict[str, str],
        record: dict[str, Any],
        extra: dict[str, Any],
        may_resize: Any,
    ) -> Targets:
        """What of the live state this checkpoint fills. Changes nothing. Raises :class:`IncompatibleCheckpoint` for a different
        optimizer. ``may_resize`` says of a buffer's name whether it may take the stored shape."""
        self._check_storage()
        captured = self.capture()
        self._load = load = _MemberLoad(record, extra=extra)
        load.new_buffers, load.gone_buffers = self._changed_buffers(stored, record, may_resize)
        buffers = [shard for shard in self._buffers(load.new_buffers) if shard.name not in load.gone_buffers]
        found = Targets([], captured.models + buffers)
        tied = {s.name: aliases[s.name] for s in found.tensors if s.name not in stored and s.name in aliases}
        model = f"{self.prefix}model."
        load.resolve = {name.removeprefix(model): other.removeprefix(model) for name, other in tied.items() if name.startswith(model)}
        found.stored_names = tied
        meshes = meshes_of(self.adapter.names.parameters.values())
        load.extra_tensors = found.early = targets(extra, stored, f"{self.name}, extra state", meshes)
        names = [piece.name for piece in captured.pieces]
        for state, last, part in zip(self.optimizers, captured.optimizers, self._optimizer_records(record), strict=True):
            states, renamed = state.targets(stored, part, last, names, load.resolve, meshes)
            found.scalars += state.load.scalars
            found.states += states
            found.stored_names.update(renamed)
            optimized = {slot.piece.name for slot in last.slots}
            empty = [piece.name for piece in captured.pieces if 0 in piece.shape and piece.name not in optimized]
            found.empty += [name for name in stored for fqn in empty if name.startswith(f"{state.prefix}{fqn}.")]
        return found

    def _changed_buffers(self, stored: dict[str, LogicalTensor], record: dict[str, Any], may_resize: Any) -> tuple[dict[str, torch.Tensor], set[str]]:
        """New tensors for buffers that are None here, or of a different shape, or cannot be filled; and the names of those that were
        None when the checkpoint was saved."""
        names, new, base = self.adapter.names, dict[str, torch.Tensor](), f"{self.prefix}buffers."
        device = next((p.device for p in names.parameters.values() if not p.is_meta), torch.device("cpu"))
        for name in names.empty:
            if (tensor := stored.get(f"{base}{name}")) is not None:
                new[name] = new_tensor(tensor, torch_dtype(tensor.dtype), device)
        for name in names.buffers:
            tensor, buffer = stored.get(f"{base}{name}"), names.buffer(name)
            if tensor is None or type(buffer) is not torch.Tensor:
                continue
            resizes = not buffer.numel() or names.loads_itself(name) or may_resize(f"{base}{name}")
            if tensor.shape != tuple(buffer.shape) and resizes:
                new[name] = new_tensor(tensor, buffer.dtype, buffer.device)
            elif buffer.is_inference():
                new[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
        gone = {f"{base}{name}" for name in record.get("empty_buffers", ()) if name in names.buffers}
        return new, gone

    def _optimizer_records(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The record of each optimizer here. Raises :class:`IncompatibleCheckpoint` where their number differs."""
        stored = [record, *record.get("more_optimizers", [])] if "optimizer" in record else []
        here = [state.name for state in self.optimizers]
        if stored and here and len(stored) != len(here):
            there = [part.get("optimizer_class") for part in stored]
            raise IncompatibleCheckpoint(
                f"{self.name} has {len(here)} optimizers here ({', '.join(here)}), {len(stored)} in the checkpoint "
                f"({', '.join(map(str, there))}); give the same ones in the same order"
            )
        return stored or [{} for _ in here]

    def _scheduler_records(self) -> list[dict[str, Any]]:
        record = self._load.record
        return [record["scheduler"], *record.get("more_schedulers", [])] if record.get("scheduler") is not None else []

    def check_load(self, override: Sequence[str]) -> list[str]:
        """After the scalars are read: refuse what this engine cannot hold. Changes nothing. Returns how this run's hyper-parameters
        and schedules differ from the checkpoint's, of which ``override`` names those that win. Raises
        :class:`IncompatibleCheckpoint`."""
        load, a, lines = self._load, self.adapter, []
        a.counters()  # refuses inside gradient accumulation: pending gradients belong to the weights that are replaced
        slots = self._slots()
        for state in self.optimizers:
            lines += state.check_load(self._of(slots, state.number), load.resolve, override, bool(a.schedulers and self._scheduler_records()))
        stored, load.override = self._scheduler_records(), tuple(override)
        if stored and a.schedulers and len(stored) != len(a.schedulers):
            raise IncompatibleCheckpoint(f"{self.name} has {len(a.schedulers)} schedulers here, {len(stored)} in the checkpoint; build as many")
        if not stored and a.schedulers:
            lines.append("this run has a learning-rate scheduler and the checkpoint has none: it starts fresh")
        if stored and not a.schedulers:
            lines.append("the checkpoint has a learning-rate scheduler and this run has none: its state is left out")
        for schedule, position in zip(self._schedules, stored, strict=False):
            lines += schedule.check(position, override)
        return [f"{self.prefix.rstrip('.') or 'the model'}: {line}" for line in lines]

    def check_extra(self) -> tuple[set[str], set[str]]:
        """Return the keys of extra state that only this run has, and those that only the checkpoint has."""
        return self._extra.keys - self._load.extra.keys(), self._load.extra.keys() - self._extra.keys

    @property
    def has_surroundings(self) -> bool:
        """Whether there are schedulers or extra state to restore before the weights."""
        return bool(self.adapter.schedulers) or bool(self._extra.keys)

    def restore_surroundings(self) -> None:
        """Restore schedulers and extra state, before any weight changes: what they refuse leaves the weights alone."""
        load, a = self._load, self.adapter
        groups = [
            {**group, **_plain(state.load.hyper_parameters.get(number, {}))}
            for state in self.optimizers
            for number, group in enumerate(state.optimizer.param_groups)
        ]
        for schedule, position in zip(self._schedules, self._scheduler_records(), strict=False):
            owner = getattr(schedule.scheduler, "optimizer", None)
            own = [number for number, state in enumerate(self.optimizers) if state.optimizer is owner]
            if own and len(self.optimizers) > 1:
                before = sum(len(state.optimizer.param_groups) for state in self.optimizers[: own[0]])
                mine = groups[before : before + len(self.optimizers[own[0]].optimizer.param_groups)]
            else:
                mine = groups if len(self.optimizers) == 1 else []
            schedule.restore(position, mine, load.override)
        device = next((p.device for p in a.names.parameters.values()), None)
        self._extra.restore({key: unflatten(value, self._extra_tensor, device) for key, value in load.extra.items() if key in self._extra.keys})

    def _extra_tensor(self, reference: Any) -> torch.Tensor:
        return self._load.extra_tensors[reference.name][0]

    def prepare(self) -> list[Shard]:
        """Give the optimizers the states that the checkpoint has; returns their shards, to be filled. Changes live state."""
        load = self._load
        for name, tensor in load.new_buffers.items():
            self.adapter.names.set_buffer(name, tensor)
        for name in load.gone_buffers:
            self.adapter.names.set_buffer(name.removeprefix(f"{self.prefix}buffers."), None)
        slots, frozen = self._slots(), [piece for piece in self._others() if piece.place]
        return [shard for state in self.optimizers for shard in state.prepare(self._of(slots, state.number), frozen)]

    @torch.no_grad()
    def restore(self, step: int, samples: int) -> None:
        """After the tensors are filled: scalars, hyper-parameters, counters. Local; the adapter's ``publish`` follows."""
        load, a = self._load, self.adapter
        slots = self._slots()
        for state in self.optimizers:
            state.restore(self._of(slots, state.number), load.resolve, scheduled=bool(a.schedulers))
        a.set_counters({"global_steps": step, "global_samples": samples, **load.record.get("counters", {})})

    def explain(self, same_ranks: bool) -> list[tuple[str, Any, Any]]:
        """After a resume, of what was captured again: where it is not what the checkpoint and this run's settings make of it, as (path,
        stored, live). ``same_ranks``: extra state was this rank's own."""
        load, captured = self._load, self.capture()
        found = [
            difference
            for state, last in zip(self.optimizers, captured.optimizers, strict=True)
            for difference in state.explain(last, load.resolve)
            if "optimizer" in load.record
        ]
        for schedule, position in zip(self._schedules, self._scheduler_records(), strict=False):
            kind = type(schedule.scheduler).__name__
            found += [(f"{kind}.{path}", a, b) for path, a, b in schedule.explain(position, load.override)]
        shared = captured.extra.keys() & load.extra.keys()
        found += differing({key: load.extra[key] for key in shared}, {key: captured.extra[key] for key in shared})
        stored, live = load.record.get("counters", {}), self.adapter.counters()
        # micro_steps: the adapter takes those of as many steps where this run's accumulation has no boundary there
        same = {
            key: value for key, value in stored.items() if key in live and key != "micro_steps" and load.record.get("engine") == self.adapter.engine
        }
        found += differing(same, {key: live[key] for key in same}) if same_ranks else []
        return [(f"{self.prefix}{path}", a, b) for path, a, b in found]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: unflatten(value, optim.no_tensor) for key, value in values.items() if key in ("lr", "initial_lr")}


class _AddressCache:
    """Cache tensor addresses; cheap while the tensors are the same objects as the last time."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._ids: list[int] = []
        self._plain: list[torch.Tensor] = []
        self._sharded: list[Any] = []
        self.kinds: list[int] = []
        """The types of what is not a tensor."""

    def look_at(self, held: list[Any]) -> None:
        ids = list(map(id, held))
        if ids != self._ids:
            self._held, self._ids = held, ids  # held, no other object gets one of their ids
            tensors = [t for t in held if isinstance(t, torch.Tensor)]
            self.kinds = [id(type(t)) for t in held if not isinstance(t, torch.Tensor)] if len(tensors) < len(held) else []
            self._sharded = [t for t in tensors if hasattr(t, "_local_tensor")]
            self._plain = [t for t in tensors if not hasattr(t, "_local_tensor")]

    def addresses(self) -> list[int]:
        return list(map(_ADDRESS, chain(self._plain, map(_LOCAL, self._sharded))))


_ADDRESS, _LOCAL, _REQUIRES_GRAD = torch.Tensor.data_ptr, attrgetter("_local_tensor"), attrgetter("requires_grad")


@dataclass
class _MemberLoad:
    """A member's part of a load under way. ``resolve``: live FQN → stored FQN of tied weights; ``new_buffers`` replace the module's own,
    ``gone_buffers`` become None again."""

    record: dict[str, Any] = field(default_factory=dict)
    resolve: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    extra_tensors: LoadedTensors = field(default_factory=dict)
    new_buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    gone_buffers: set[str] = field(default_factory=set)
    override: tuple[str, ...] = ()


def _check_copy(piece: Piece, rank: int) -> None:
    if piece.low is None or piece.low is piece.local:
        return
    derived = piece.local.to(piece.low.dtype).to(piece.low.device)  # offloaded masters lie on another device
    if torch.equal(derived, piece.low) or torch.equal(derived.nan_to_num(), piece.low.nan_to_num()):
        return
    raise LayoutError(
        f"rank {rank}: the fp32 master of {piece.name} and the copy that training computes with differ. Either the weights were changed "
        "after deepspeed.initialize (load them before it), or this DeepSpeed release lays its buffers out in a way this version does not know"
    )
