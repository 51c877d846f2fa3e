"""One model with its optimizer and scheduler, as the checkpoint sees it: shards to save, targets to fill, one record."""

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import IncompatibleCheckpoint, LayoutError
from engine.format.layout import REPLICATED, Grid, LogicalTensor, Mesh
from engine.state import optimizer as optim
from engine.state.boxes import check_tiling
from engine.state.plain import world_size
from engine.state.scheduler import position, restore_position
from engine.state.shard import Shard, check_shard
from engine.state.source import Adapter, Piece


@dataclass
class Targets:
    """What a load fills. ``scalars`` are temporaries and come first: they decide whether the rest fits. ``tensors`` alias live
    parameters and buffers. ``states`` describe the optimizer's tensors, which :meth:`Member.prepare` will make.
    ``stored_names`` maps a live name to the checkpoint's where they differ (tied weights)."""

    scalars: list[Shard]
    tensors: list[Shard]
    states: list[LogicalTensor] = field(default_factory=list)
    stored_names: dict[str, str] = field(default_factory=dict)


class Member:
    """``prefix`` is empty for a job's only model, else the member's name and a dot."""

    def __init__(self, prefix: str, adapter: Adapter, rank: int) -> None:
        self.prefix = prefix
        self.adapter = adapter
        self.rank = rank
        self._scalars: list[Shard] = []
        self._resolve: dict[str, str] = {}
        self._stored_state: dict[str, dict[str, LogicalTensor]] = {}

    def check(self) -> None:
        """On attach: every rule tiles its parameter, live storage has the size the rule says, and every master equals its
        low-precision copy, element by element. Raises :class:`LayoutError`. No communication."""
        for shard in self.shards():
            check_tiling(shard.tensor)
            check_shard(shard, self.rank)
        for slot in self.adapter.slots():
            _check_copy(slot.piece, self.rank)

    def shards(self) -> list[Shard]:
        """All live state, in a stable order: parameters, optimizer state, buffers."""
        slots = self.adapter.slots()
        pieces = [slot.piece for slot in slots] + self.adapter.others()
        shards = [self._model_shard(piece) for piece in pieces]
        if self.adapter.optimizer is not None:
            shards += optim.state_shards(f"{self.prefix}optim.state.", self.adapter.optimizer, slots)
        return shards + self._buffers()

    def _model_shard(self, piece: Piece) -> Shard:
        return optim.tensor_shard(f"{self.prefix}model.{piece.name}", piece.shape, piece.layout, piece.local)

    def _buffers(self) -> list[Shard]:
        """Rank 0's: buffers may differ by rank (BatchNorm statistics), and one rank's must be taken together."""
        layout = Grid(Mesh((world_size(),)), (REPLICATED,), writer=0)
        found = []
        for name, raw in self.adapter.names.buffers.items():
            buffer = self.adapter.module.get_buffer(raw).detach()
            found.append(optim.tensor_shard(f"{self.prefix}buffers.{name}", tuple(buffer.shape), layout, buffer))
        return found

    def aliases(self) -> dict[str, str]:
        """Further names of tied tensors, as the checkpoint has them."""
        return {f"{self.prefix}model.{a}": f"{self.prefix}model.{name}" for a, name in self.adapter.names.aliases.items()}

    def record(self) -> dict[str, Any]:
        """Everything replicated that is not a tensor."""
        a, slots = self.adapter, self.adapter.slots()
        record: dict[str, Any] = {"engine": a.engine, "counters": a.counters()}
        if a.optimizer is not None:
            record["optimizer"] = optim.family(a.optimizer)
            record["groups"] = optim.hyper_parameters(a.optimizer, slots)
            record["scalars"] = optim.python_scalars(a.optimizer, slots)
            record["stateless"] = [s.piece.name for s in slots if not a.optimizer.state.get(s.holder)]
        if a.scheduler is not None:
            record["scheduler"] = position(a.scheduler)
        return record

    def targets(self, stored: dict[str, LogicalTensor], aliases: dict[str, str], record: dict[str, Any]) -> Targets:
        """What of the live state this checkpoint fills. Changes nothing yet. Raises :class:`IncompatibleCheckpoint` for
        another optimizer."""
        a, slots = self.adapter, self.adapter.slots()
        pieces = [slot.piece for slot in slots] + a.others()
        names = [piece.name for piece in pieces]
        model = f"{self.prefix}model."
        self._resolve = {n: aliases[model + n].removeprefix(model) for n in names if model + n not in stored and model + n in aliases}
        targets = Targets([], [self._model_shard(piece) for piece in pieces] + self._buffers())
        targets.stored_names = {model + n: model + canonical for n, canonical in self._resolve.items()}
        if a.optimizer is None:
            return targets
        if record.get("optimizer") not in (None, optim.family(a.optimizer)):
            raise IncompatibleCheckpoint(
                f"{self.prefix or 'the '}optimizer is {optim.family(a.optimizer)} here, but the checkpoint was saved with {record['optimizer']}: "
                "their states do not mean the same. Resume with the same optimizer"
            )
        self._stored_state = self._states(stored, names)
        prefix = f"{self.prefix}optim.state."
        self._scalars = targets.scalars = optim.scalar_targets(prefix, slots, self._stored_state)
        targets.states = optim.describe(prefix, a.optimizer, slots, self._stored_state)
        for fqn, states in self._stored_state.items():
            targets.stored_names.update(
                {f"{prefix}{fqn}.{key}": tensor.name for key, tensor in states.items() if tensor.name != f"{prefix}{fqn}.{key}"}
            )
        return targets

    def _states(self, stored: dict[str, LogicalTensor], names: list[str]) -> dict[str, dict[str, LogicalTensor]]:
        """The checkpoint's optimizer tensors by live FQN and key."""
        prefix = f"{self.prefix}optim.state."
        by_name: dict[str, dict[str, LogicalTensor]] = {}
        for tensor in stored.values():
            if tensor.name.startswith(prefix):
                fqn, _, key = tensor.name.removeprefix(prefix).rpartition(".")
                by_name.setdefault(fqn, {})[key] = tensor
        return {n: by_name[self._resolve.get(n, n)] for n in names if self._resolve.get(n, n) in by_name}

    def check_scalars(self, record: dict[str, Any]) -> None:
        """After the scalars are read: refuse what this engine cannot hold. Raises :class:`IncompatibleCheckpoint`."""
        if self.adapter.optimizer is not None:
            optim.check_holders(self.adapter.slots(), self._loaded_scalars(record), self._stored_state)

    def prepare(self, record: dict[str, Any]) -> list[Shard]:
        """Give the optimizer the states that the checkpoint has; returns their shards, to be filled. The first change to live
        state."""
        a, slots = self.adapter, self.adapter.slots()
        if a.optimizer is None:
            return []
        optim.allocate(a.optimizer, slots, self._stored_state, self._loaded_scalars(record))
        return [shard for shard in optim.state_shards(f"{self.prefix}optim.state.", a.optimizer, slots) if shard.tensor.shape]

    def _loaded_scalars(self, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
        prefix = f"{self.prefix}optim.state."
        stored = record.get("scalars", {})
        values = {s.piece.name: dict(stored.get(self._resolve.get(s.piece.name, s.piece.name), {})) for s in self.adapter.slots()}
        for shard in self._scalars:
            fqn, _, key = shard.name.removeprefix(prefix).rpartition(".")
            local = shard.locals[0]
            assert local is not None
            values[fqn][key] = local.item()
        return values

    @torch.no_grad()
    def restore(self, record: dict[str, Any], step: int, samples: int) -> None:
        """After the tensors are filled: scalars, hyper-parameters, scheduler, counters. Local; the adapter's ``publish`` follows."""
        a, slots = self.adapter, self.adapter.slots()
        if a.optimizer is not None:
            optim.apply_scalars(a.optimizer, slots, self._loaded_scalars(record))
            optim.restore_hyper_parameters(a.optimizer, slots, record.get("groups", []), self._resolve)
        if a.scheduler is not None and record.get("scheduler") is not None:
            restore_position(a.scheduler, record["scheduler"])
        a.set_counters({"global_steps": step, "global_samples": samples, **record.get("counters", {})})


def _check_copy(piece: Piece, rank: int) -> None:
    if piece.low is None or piece.low is piece.local:
        return
    derived = piece.local.to(piece.low.dtype)
    if torch.equal(derived, piece.low) or torch.equal(derived.nan_to_num(), piece.low.nan_to_num()):
        return
    raise LayoutError(
        f"rank {rank}: the fp32 master of {piece.name} and the copy that training computes with differ. Either the weights were changed "
        "after deepspeed.initialize (load them before it), or this DeepSpeed release lays its buffers out in a way this version does not know"
    )
