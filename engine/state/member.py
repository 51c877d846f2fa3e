"""One model with its optimizer and scheduler, as the checkpoint sees it: shards to save, targets to fill, one record."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from msgspec.structs import replace

from engine.errors import IncompatibleCheckpoint, LayoutError
from engine.format.layout import REPLICATED, Grid, LogicalTensor, Mesh
from engine.state import optimizer as optim
from engine.state.boxes import check_tiling
from engine.state.parts import Held, held, join
from engine.state.plain import layout_of, local_of, world_size
from engine.state.scheduler import check_position, position, restore_position
from engine.state.shard import Shard, check_shard, dtype_name
from engine.state.source import Adapter, Piece, Slot

logger = logging.getLogger("engine")


@dataclass
class Targets:
    """What a load fills. ``scalars`` are temporaries and come first: they decide whether the rest fits. ``tensors`` alias live
    parameters and buffers. ``states`` describe the optimizer's tensors, which :meth:`Member.prepare` will make.
    ``stored_names`` maps a live name to the checkpoint's where they differ (tied weights)."""

    scalars: list[Shard]
    tensors: list[Shard]
    states: list[LogicalTensor] = field(default_factory=list)
    stored_names: dict[str, str] = field(default_factory=dict)


@dataclass
class Captured:
    """``where`` it all lay; ``pieces``: all parameters, of which ``models`` are the shards; ``stepped``: the names of tensors that only
    the optimizer's step changes; ``frozen``: parts of tensors, by name and offsets, whose parameters nobody trains; ``int_steps``: copies
    of counters that live as Python numbers; ``lasting``: what of the record is the same while all lies there."""

    where: list[int]
    slots: list[Slot]
    pieces: list[Piece]
    models: list[Shard]
    shards: list[Shard]
    stepped: frozenset[str]
    frozen: frozenset[tuple[str, tuple[int, ...]]]
    int_steps: list[tuple[torch.Tensor, torch.Tensor]]
    lasting: optim.Lasting | None = None


class Member:
    """``prefix`` is empty for a job's only model, else the member's name and a dot."""

    def __init__(self, prefix: str, adapter: Adapter, rank: int) -> None:
        self.prefix = prefix
        self.adapter = adapter
        self.rank = rank
        self._load = _MemberLoad()
        self._captured: Captured | None = None
        self._watched = _Watched()

    def check(self) -> None:
        """On attach: every rule tiles its parameter, live storage has the size the rule says, and every master equals its
        low-precision copy, element by element. Raises :class:`LayoutError`. No communication."""
        for shard in self.shards():
            check_tiling(shard.tensor)
            check_shard(shard, self.rank)
        for slot in self._slots():
            _check_copy(slot.piece, self.rank)

    def _slots(self) -> list[Slot]:
        placed = self.adapter.names.placed
        return [replace(slot, piece=placed(slot.piece)) for slot in self.adapter.slots()] if self.adapter.names.places else self.adapter.slots()

    def _others(self) -> list[Piece]:
        placed = self.adapter.names.placed
        return [placed(piece) for piece in self.adapter.others()] if self.adapter.names.places else self.adapter.others()

    def shards(self) -> list[Shard]:
        """All live state, in a stable order: parameters, optimizer state, buffers."""
        slots, others = self._slots(), self._others()
        shards = self._model_shards([slot.piece for slot in slots] + others)
        return shards + self._state_shards(slots, others) + self._buffers()

    def capture(self) -> "Captured":
        """As :meth:`shards`, for a save. The last answer serves while every tensor lies where it lay: enumerating 10,000 of them
        takes longer than looking whether any has moved."""
        self.adapter.names.check()
        where = self._whereabouts()
        if self._captured is None or self._captured.where != where:
            slots, others = self._slots(), self._others()
            pieces = [slot.piece for slot in slots] + others
            models, states = self._model_shards(pieces), self._state_shards(slots, others)
            stepped = {f"{self.prefix}model.{slot.piece.name}" for slot in slots} | {shard.name for shard in states}
            stepped -= {f"{self.prefix}model.{piece.name}" for piece in others}  # rows of one tensor, partly frozen
            fixed = {name for name, p in self.adapter.names.parameters.items() if not p.requires_grad}
            frozen = frozenset(
                (f"{self.prefix}model.{placed.name}", placed.place.offsets if placed.place else ())
                for piece in self.adapter.others()
                if piece.name in fixed
                for placed in (self.adapter.names.placed(piece),)
            )
            counters = optim.int_steps(a.optimizer, states, self._state_prefix, slots) if (a := self.adapter).optimizer is not None else []
            self._captured = Captured(where, slots, pieces, models, models + states + self._buffers(), frozenset(stepped), frozen, counters)
        elif self.adapter.optimizer is not None:
            optim.refresh_int_steps(self.adapter.optimizer, self._captured.int_steps)
        return self._captured

    def _whereabouts(self) -> list[int]:
        """Changes when any live tensor moves, when the optimizer's are replaced, added or removed, and when one begins or ceases to be
        trained. What was captured keeps its memory, so that nothing new can lie in the place of something old."""
        a = self.adapter
        parameters = a.names.parameters.values()
        flags = list(map(_REQUIRES_GRAD, parameters))
        held: list[Any] = [getattr(p, "ds_tensor", p) for p in parameters]
        held += a.anchors()
        held += [a.module.get_buffer(raw) for raw in a.names.buffers.values()]
        if a.optimizer is not None:
            states = a.optimizer.state.values()
            flags += map(id, chain.from_iterable(group["params"] for group in a.optimizer.param_groups))
            flags += map(len, states)
            held += chain.from_iterable(state.values() for state in states)
        self._watched.look_at(held)
        return self._watched.addresses() + flags

    @property
    def _state_prefix(self) -> str:
        return f"{self.prefix}optim.state."

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

    def _state_shards(self, slots: list[Slot], others: list[Piece]) -> list[Shard]:
        if self.adapter.optimizer is None:
            return []
        return optim.state_shards(self._state_prefix, self.adapter.optimizer, slots, [piece for piece in others if piece.place])

    def _buffers(self) -> list[Shard]:
        """Rank 0's: buffers may differ by rank (BatchNorm statistics), and one rank's must be taken together."""
        first = Grid(Mesh((world_size(),)), (REPLICATED,), writer=0)
        found = []
        for name, raw in self.adapter.names.buffers.items():
            buffer = self.adapter.module.get_buffer(raw)
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
        a, slots = self.adapter, self._captured.slots if self._captured else self._slots()
        record: dict[str, Any] = {"engine": a.engine, "counters": a.counters()}
        if a.optimizer is not None:
            if self._captured is None or self._captured.lasting is None:
                lasting = optim.lasting_record(a.optimizer, slots)
                if self._captured is not None:
                    self._captured.lasting = lasting
            else:
                lasting = self._captured.lasting
            record |= lasting.record
            record["groups"] = optim.hyper_parameters(a.optimizer, lasting.names)
            record["scalars"] = optim.python_scalars(a.optimizer, slots) if lasting.has_numbers else {}
        if a.scheduler is not None:
            record["scheduler"] = position(a.scheduler)
        return record

    # A load calls these in order: targets, check, prepare, restore.

    def targets(self, stored: dict[str, LogicalTensor], aliases: dict[str, str], record: dict[str, Any]) -> Targets:
        """What of the live state this checkpoint fills. Changes nothing. Raises :class:`IncompatibleCheckpoint` for another
        optimizer."""
        a, captured = self.adapter, self.capture()
        slots = captured.slots
        targets = Targets([], captured.models + self._buffers())
        tied = {s.name: aliases[s.name] for s in targets.tensors if s.name not in stored and s.name in aliases}
        model = f"{self.prefix}model."
        resolve = {name.removeprefix(model): other.removeprefix(model) for name, other in tied.items() if name.startswith(model)}
        self._load = load = _MemberLoad(record, resolve)
        targets.stored_names = tied
        if a.optimizer is None:
            return targets
        if record.get("optimizer") not in (None, optim.family(a.optimizer)):
            raise IncompatibleCheckpoint(
                f"{self.prefix or 'the '}optimizer is {optim.family(a.optimizer)} here, but the checkpoint was saved with {record['optimizer']}: "
                "their states do not mean the same. Resume with the same optimizer"
            )
        prefix = self._state_prefix
        load.states = self._stored_states(stored, [piece.name for piece in captured.pieces])
        kept = {name: stored[full] for name in load.states if (full := f"{model}{resolve.get(name, name)}") in stored}
        load.shapes = {name: tensor.shape for name, tensor in kept.items()}
        load.scalars = targets.scalars = optim.scalar_targets(prefix, slots, load.states)
        if record.get("optimizer_class") == type(a.optimizer).__name__:
            load.same_dtype = {s.piece.name for s in slots if _has_dtype(kept.get(s.piece.name), s.piece)}
        targets.states = optim.describe(prefix, a.optimizer, slots, load.states, load.same_dtype, load.shapes) + self._lost_states(stored, record)
        for fqn, states in load.states.items():
            targets.stored_names.update(
                {f"{prefix}{fqn}.{key}": tensor.name for key, tensor in states.items() if tensor.name != f"{prefix}{fqn}.{key}"}
            )
        return targets

    def _stored_states(self, stored: dict[str, LogicalTensor], names: list[str]) -> optim.States:
        by_name: optim.States = {}
        for tensor in stored.values():
            if tensor.name.startswith(self._state_prefix):
                fqn, _, key = tensor.name.removeprefix(self._state_prefix).rpartition(".")
                by_name.setdefault(fqn, {})[key] = tensor
        resolve = self._load.resolve
        return {n: by_name[resolve.get(n, n)] for n in names if resolve.get(n, n) in by_name}

    def _lost_states(self, stored: dict[str, LogicalTensor], record: dict[str, Any]) -> list[LogicalTensor]:
        """Parameters that were in no optimizer when the checkpoint was saved, or not in the model: what the optimizer has for them
        here is kept. The former are named ``….*``, in no checkpoint, so that they count as missing; the latter do so themselves."""
        load, model = self._load, f"{self.prefix}model."
        known = {name for group in record.get("groups", []) for name in group["params"]}
        load.kept = {s.piece.name for s in self._slots() if load.resolve.get(s.piece.name, s.piece.name) not in known}
        lost = sorted(name for name in load.kept if f"{model}{load.resolve.get(name, name)}" in stored)
        return [LogicalTensor(f"{self._state_prefix}{name}.*", "F32", (), ()) for name in lost]

    def check_load(self, override: Sequence[str]) -> list[str]:
        """After the scalars are read: refuse what this engine cannot hold. Changes nothing. Returns how this run's hyper-parameters
        differ from the checkpoint's, of which ``override`` names those that win. Raises :class:`IncompatibleCheckpoint`."""
        load, a, told = self._load, self.adapter, []
        a.counters()  # refuses inside gradient accumulation: pending gradients belong to the weights that are replaced
        if a.optimizer is not None:
            slots = self._slots()
            load.values = self._scalar_values(slots)
            optim.check_holders(slots, load.values, load.states, load.kept)
            load.unseen = optim.check_kinds(a.optimizer, slots, load.states, load.kept, load.record)
            chosen = optim.choose_hyper_parameters(slots, load.record.get("groups", []), load.resolve)
            load.hyper_parameters, told = optim.settle_hyper_parameters(a.optimizer, chosen, override)
        if a.scheduler is not None and load.record.get("scheduler") is not None:
            check_position(a.scheduler, load.record["scheduler"])
        elif a.scheduler is not None or load.record.get("scheduler") is not None:
            has, lacks = ("this run", "the checkpoint") if a.scheduler is not None else ("the checkpoint", "this run")
            logger.warning("%s has a learning-rate scheduler and %s has none; it starts anew, or is left out", has, lacks)
        return [f"{self.prefix.rstrip('.') or 'the model'}: {line}" for line in told]

    def _scalar_values(self, slots: list[Any]) -> optim.Scalars:
        load, stored = self._load, self._load.record.get("scalars", {})
        values = {s.piece.name: dict(stored.get(load.resolve.get(s.piece.name, s.piece.name), {})) for s in slots}
        for shard in load.scalars:
            fqn, _, key = shard.name.removeprefix(self._state_prefix).rpartition(".")
            local = shard.locals[0]
            assert local is not None
            values[fqn][key] = local.item()
        return values

    def prepare(self) -> list[Shard]:
        """Give the optimizer the states that the checkpoint has; returns their shards, to be filled. The first change to live
        state."""
        load, a = self._load, self.adapter
        if a.optimizer is None:
            return []
        slots = self._slots()
        optim.allocate(a.optimizer, slots, load.states, load.values, load.record, load.same_dtype, load.kept, load.shapes)
        scalars = {shard.name for shard in load.scalars}
        return [shard for shard in self._state_shards(slots, self._others()) if shard.name not in scalars]

    @torch.no_grad()
    def restore(self, step: int, samples: int) -> None:
        """After the tensors are filled: scalars, hyper-parameters, scheduler, counters. Local; the adapter's ``publish`` follows."""
        load, a = self._load, self.adapter
        if a.optimizer is not None:
            optim.apply_scalars(a.optimizer, self._slots(), load.values)
            optim.apply_hyper_parameters(a.optimizer, load.hyper_parameters)
            if load.unseen:
                optim.watch_first_step(a.optimizer)
        if a.scheduler is not None and load.record.get("scheduler") is not None:
            restore_position(a.scheduler, load.record["scheduler"])
        a.set_counters({"global_steps": step, "global_samples": samples, **load.record.get("counters", {})})


class _Watched:
    """Where many objects lie: the same ones as the last time, as a rule, so that few steps are taken for each."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._ids: list[int] = []
        self._plain: list[torch.Tensor] = []
        self._sharded: list[Any] = []

    def look_at(self, held: list[Any]) -> None:
        ids = list(map(id, held))
        if ids != self._ids:
            self._held, self._ids = held, ids  # held, no other object gets one of their ids
            tensors = [t for t in held if isinstance(t, torch.Tensor)]
            self._sharded = [t for t in tensors if hasattr(t, "_local_tensor")]
            self._plain = [t for t in tensors if not hasattr(t, "_local_tensor")]

    def addresses(self) -> list[int]:
        return list(map(_ADDRESS, chain(self._plain, map(_LOCAL, self._sharded))))


_ADDRESS, _LOCAL, _REQUIRES_GRAD = torch.Tensor.data_ptr, attrgetter("_local_tensor"), attrgetter("requires_grad")


@dataclass
class _MemberLoad:
    """A member's part of a load under way. ``resolve``: live FQN → stored FQN of tied weights; ``kept``: parameters whose
    optimizer state stays as it is; ``same_dtype``: those whose states the same optimizer made for the same dtype."""

    record: dict[str, Any] = field(default_factory=dict)
    resolve: dict[str, str] = field(default_factory=dict)
    states: optim.States = field(default_factory=dict)
    scalars: list[Shard] = field(default_factory=list)
    values: optim.Scalars = field(default_factory=dict)
    hyper_parameters: dict[int, dict[str, Any]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    same_dtype: set[str] = field(default_factory=set)
    shapes: optim.Shapes = field(default_factory=dict)
    unseen: bool = False


def _has_dtype(stored: LogicalTensor | None, piece: Piece) -> bool:
    return stored is not None and stored.dtype == dtype_name(piece.local.dtype)


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
