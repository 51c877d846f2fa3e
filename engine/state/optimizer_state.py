"""One optimizer of a member, as the checkpoint sees it: its shards and its record, and how a load fills it.

By parameter where that is all there is: sharded, and the same under every engine. An optimizer whose
``state_dict`` lists more than its state and its param groups is carried as that dict, whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.layout import LogicalTensor
from engine.format.record import Array, Reference, Typed, encode_record
from engine.state import optimizer as optim
from engine.state.attributes import Attributes
from engine.state.carried import Carried, LoadedTensors, targets
from engine.state.optimizers import Part
from engine.state.plain import local_of, world_size
from engine.state.shard import Shard, dtype_name
from engine.state.source import Piece, Slot
from engine.state.values import OMIT, differing, holds_tensors, is_code, refuse, small_array, unflatten


@dataclass
class OptimizerLoad:
    """An optimizer's part of a load under way. ``kept``: parameters whose state stays as it is;
    ``same_dtype``: those whose states the same optimizer made for the same dtype."""

    record: dict[str, Any] = field(default_factory=dict)
    states: optim.States = field(default_factory=dict)
    scalars: list[Shard] = field(default_factory=list)
    values: optim.Scalars = field(default_factory=dict)
    hyper_parameters: dict[int, dict[str, Any]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    same_dtype: set[str] = field(default_factory=set)
    shapes: optim.Shapes = field(default_factory=dict)
    unseen: bool = False
    tensors: LoadedTensors = field(default_factory=dict)


@dataclass
class CapturedOptimizer:
    """What lasts while no tensor moves: the shards by parameter, counters that live as Python numbers,
    and where values are nested."""

    slots: list[Slot]
    shards: list[Shard]
    int_steps: list[tuple[torch.Tensor, torch.Tensor]]
    nested: list[tuple[Slot, str]]
    loose: list[Any]
    lasting: optim.Lasting


class OptimizerState:
    """``member`` is the member's prefix; ``number`` says which of the adapter's optimizers this is."""

    def __init__(self, member: str, part: Part, number: int) -> None:
        self.optimizer, self.number = part.optimizer, number
        self.label = part.label
        base = f"{member}optim." + (f"{part.label}." if part.label else "")
        self.prefix = f"{base}state."
        self._carried_as = f"{base}carried"
        self._model = f"{member}model."
        self.load = OptimizerLoad()
        self._attributes = Attributes(self.optimizer)
        self.is_whole = False
        """Whether it is carried as its own state dict, as found when its structure was looked at last."""

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__ + (f" ({self.label})" if self.label else "")

    def _listed_more(self) -> list[str]:
        kind = type(self.optimizer)
        hooks = getattr(self.optimizer, "_optimizer_state_dict_post_hooks", None)
        if not issubclass(kind, torch.optim.Optimizer):
            return ["what is not a torch optimizer's"]
        if kind.state_dict is torch.optim.Optimizer.state_dict and not hooks:
            return []
        state = self.optimizer.state_dict()
        if not isinstance(state, Mapping):
            return [f"a {type(state).__name__}"]
        return sorted(str(key) for key in state.keys() - {"state", "param_groups"})

    def check_state(self, slots: list[Slot]) -> None:
        """Raise :class:`UsageError` or :class:`LayoutError` for state that exists and cannot be saved."""
        self.capture(slots, ())
        optim.hyper_parameters(self.optimizer, {})

    def capture(self, slots: list[Slot], frozen: Sequence[Piece]) -> CapturedOptimizer:
        """Enumerate the state by parameter; as a whole where the object lists more, or keeps what cannot be told apart.

        Called at attach, and whenever the structure of the state has changed. Raises :class:`UsageError` or
        :class:`LayoutError` for what can be neither sharded nor carried, naming it.
        """
        listed = self._listed_more()
        if listed and optim.is_flat(slots):
            raise UsageError(
                f"{self.name} lists {', '.join(listed[:4])} in its state_dict() besides states and param groups. Under ZeRO, which gives it flat "
                "buffers, this version cannot save that; use FSDP2, DDP or ZeRO stage 0"
            )
        self.is_whole = bool(listed)
        try:
            captured = self._enumerate(slots, frozen)
            self.carried(captured)  # refuses what a record cannot hold, now and not at the first save
        except UsageError:
            own = type(self.optimizer).state_dict is not torch.optim.Optimizer.state_dict
            if self.is_whole or not own or optim.is_flat(slots):
                raise
            self.is_whole = True
            captured = self._enumerate(slots, frozen)
            self.carried(captured)
        return captured

    def _enumerate(self, slots: list[Slot], frozen: Sequence[Piece]) -> CapturedOptimizer:
        lasting = optim.lasting_record(self.optimizer, slots)
        if self.is_whole:
            return CapturedOptimizer(slots, [], [], [], [], lasting)
        nested, loose = optim.nested_keys(self.optimizer, slots), optim.loose_keys(self.optimizer, slots)
        shards = optim.state_shards(self.prefix, self.optimizer, slots, frozen)
        counters = optim.int_steps(self.optimizer, shards, self.prefix, slots)
        return CapturedOptimizer(slots, shards, counters, nested, loose, lasting)

    def refresh(self, captured: CapturedOptimizer) -> bool:
        """Take over counters that live as numbers; returns whether what was captured still serves."""
        return optim.refresh_int_steps(self.optimizer, captured.int_steps)

    def carried(self, captured: CapturedOptimizer) -> tuple[dict[str, Any], list[Shard]]:
        """Return what is not laid out by parameter, for the record, and the tensors in it."""
        if self.is_whole:
            whole = Carried(self._carried_as, self._refuse_local(captured.slots))
            plain = whole.flatten(self.optimizer.state_dict(), self.name, self._unknown(self.name))
            return {"whole": plain}, whole.shards
        if not captured.nested and not captured.loose:
            return {}, []
        more = Carried(self._carried_as, self._refuse_local(captured.slots))
        nested: dict[str, dict[str, Any]] = {}
        for slot, key in captured.nested:
            fqn = slot.piece.name
            value = self.optimizer.state[slot.holder][key]
            flat = more.flatten(value, f"{fqn}.{key}", self._unknown(f"{self.name}, state of {fqn}"))
            if slot.cut is not None and holds_tensors(flat):
                raise UsageError(
                    f"{self.name} keeps {key} of {fqn} as a {type(value).__name__} with tensors: under ZeRO, which gives it flat buffers, they "
                    "cannot be told apart by parameter. Use FSDP2, DDP or ZeRO stage 0"
                )
            if flat is not OMIT:
                nested.setdefault(fqn, {})[key] = flat
        loose = []
        for key in captured.loose:
            flat_key = more.flatten(key, "a key", self._unknown(self.name))
            flat = more.flatten(self.optimizer.state[key], f"state[{key!r}]", self._unknown(self.name))
            loose.append([flat_key, flat])
        return {"nested": nested, "loose": loose}, more.shards

    def _unknown(self, owner: str) -> Any:
        known = refuse(owner)
        return lambda path, value: OMIT if is_code(value) else known(path, value)

    def _refuse_local(self, slots: Sequence[Slot]) -> Any:
        """Where parameters are sharded, a plain tensor with several elements may differ by rank."""
        sharded = world_size() > 1 and any(hasattr(slot.holder, "_local_tensor") for slot in slots)

        def check(path: str, tensor: torch.Tensor) -> None:
            if sharded and not hasattr(tensor, "_local_tensor") and tensor.numel() > 1:
                raise UsageError(
                    f"{self.name}: {path} is a plain tensor of {list(tensor.shape)} beside parameters sharded by FSDP2; it may differ by rank, so "
                    "it cannot be saved as one. Keep such states as DTensors"
                )

        return check

    def record(self, captured: CapturedOptimizer, carried: dict[str, Any]) -> dict[str, Any]:
        """Everything of it that is not a tensor, as captured last."""
        lasting = captured.lasting
        record = dict(lasting.record)
        if self.label:
            record["label"] = self.label
        record["groups"] = optim.hyper_parameters(self.optimizer, lasting.names)
        listed = {"state", "param_groups", "defaults", *carried.get("whole", ())} if isinstance(carried.get("whole", {}), dict) else set()
        if attributes := self._attributes.capture(listed):
            record["attributes"] = attributes
        by_parameter = lasting.has_numbers and "whole" not in carried
        record["scalars"] = optim.python_scalars(self.optimizer, captured.slots) if by_parameter else {}
        return {**record, **carried}

    # A load calls these in order: targets, check_load, prepare, restore.

    def targets(
        self,
        stored: dict[str, LogicalTensor],
        record: dict[str, Any],
        captured: CapturedOptimizer,
        names: Sequence[str],
        resolve: Mapping[str, str],
        meshes: Sequence[Any],
    ) -> tuple[list[LogicalTensor], dict[str, str]]:
        """Begin a load: return the states that will be filled, and by live name the stored name where they differ.

        Changes nothing. Raises :class:`IncompatibleCheckpoint` for a different optimizer.
        """
        live = optim.family(self.optimizer)
        if record.get("optimizer") not in (None, live):
            raise IncompatibleCheckpoint(
                f"{self._model.removesuffix('model.') or 'the '}optimizer is {live} here, but the checkpoint was saved with "
                f"{record['optimizer']}: their states do not mean the same. Resume with the same optimizer"
            )
        self.load = load = OptimizerLoad(record)
        load.tensors = self._carried_targets(record, stored, captured, meshes)
        slots = captured.slots
        whole = "whole" in record
        load.states = {} if whole else self._stored_states(stored, names, resolve, load.tensors)
        kept = {name: stored[full] for name in names if (full := f"{self._model}{resolve.get(name, name)}") in stored}
        load.shapes = {name: tensor.shape for name, tensor in kept.items()}
        load.scalars = optim.scalar_targets(self.prefix, slots, load.states)
        if self.is_same_class:
            load.same_dtype = {s.piece.name for s in slots if _has_dtype(kept.get(s.piece.name), s.piece)}
        described = optim.describe(self.prefix, self.optimizer, slots, load.states, load.same_dtype, load.shapes)
        described += self._lost_states(stored, record, slots, resolve)
        described += [shard.tensor for _, shard in load.tensors.values()]
        renamed = {
            f"{self.prefix}{fqn}.{key}": tensor.name
            for fqn, states in load.states.items()
            for key, tensor in states.items()
            if tensor.name != f"{self.prefix}{fqn}.{key}"
        }
        return described, renamed

    @property
    def is_same_class(self) -> bool:
        return self.load.record.get("optimizer_class") == type(self.optimizer).__name__

    def _carried_targets(
        self, record: dict[str, Any], stored: dict[str, LogicalTensor], captured: CapturedOptimizer, meshes: Sequence[Any]
    ) -> LoadedTensors:
        if "whole" in record and optim.is_flat(captured.slots):
            raise IncompatibleCheckpoint(
                f"{self.name} was saved as its own state dict, which has no place in ZeRO's flat buffers. Resume under FSDP2, DDP or ZeRO stage 0"
            )
        plain = [record.get("whole"), record.get("nested"), record.get("loose")]
        return targets(plain, stored, self.name, meshes)

    def _stored_states(
        self, stored: dict[str, LogicalTensor], names: Sequence[str], resolve: Mapping[str, str], carried: LoadedTensors
    ) -> optim.States:
        by_name: optim.States = {}
        for tensor in stored.values():
            if tensor.name.startswith(self.prefix) and tensor.name not in carried:
                fqn, _, key = tensor.name.removeprefix(self.prefix).rpartition(".")
                by_name.setdefault(fqn, {})[key] = tensor
        return {n: by_name[resolve.get(n, n)] for n in names if resolve.get(n, n) in by_name}

    def _lost_states(
        self, stored: dict[str, LogicalTensor], record: dict[str, Any], slots: Sequence[Slot], resolve: Mapping[str, str]
    ) -> list[LogicalTensor]:
        """Parameters that were in no optimizer when the checkpoint was saved, or not in the model: what the optimizer has for them
        here is kept. The former are named ``….*``, in no checkpoint, so that they count as missing; the latter do so themselves."""
        known = {name for group in record.get("groups", []) for name in group["params"]}
        self.load.kept = {s.piece.name for s in slots if resolve.get(s.piece.name, s.piece.name) not in known}
        full = {name: stored.get(f"{self._model}{resolve.get(name, name)}") for name in self.load.kept}
        lost = sorted(name for name, tensor in full.items() if tensor is not None and 0 not in tensor.shape)  # no elements, no state
        return [LogicalTensor(f"{self.prefix}{name}.*", "F32", (), ()) for name in lost]

    def check_load(self, slots: Sequence[Slot], resolve: Mapping[str, str], override: Sequence[str], is_scheduled: bool) -> list[str]:
        """After the scalars are read: refuse what this engine cannot hold. Changes nothing. Returns how this run's hyper-parameters
        differ from the checkpoint's, of which ``override`` names those that win; ``is_scheduled``: a scheduler sets the rate in both.
        Raises :class:`IncompatibleCheckpoint`."""
        load = self.load
        load.values = self._scalar_values(slots, resolve)
        if "whole" not in load.record:
            optim.check_holders([slot for slot in slots if 0 not in slot.piece.shape], load.values, load.states, load.kept)
            load.unseen = optim.check_kinds(self.optimizer, slots, load.states, load.kept, load.record)
        chosen = optim.choose_hyper_parameters(slots, load.record.get("groups", []), dict(resolve))
        load.hyper_parameters, lines = optim.settle_hyper_parameters(self.optimizer, chosen, override, is_scheduled)
        return lines

    def _scalar_values(self, slots: Sequence[Slot], resolve: Mapping[str, str]) -> optim.Scalars:
        load, stored = self.load, self.load.record.get("scalars", {})
        values = {s.piece.name: dict(stored.get(resolve.get(s.piece.name, s.piece.name), {})) for s in slots}
        for shard in load.scalars:
            fqn, _, key = shard.name.removeprefix(self.prefix).rpartition(".")
            local = shard.locals[0]
            assert local is not None
            values[fqn][key] = local.item()
        return values

    def prepare(self, slots: list[Slot], frozen: Sequence[Piece]) -> list[Shard]:
        """Give the optimizer the states that the checkpoint has; returns their shards, to be filled. Changes live state."""
        load = self.load
        carried = [shard for _, shard in load.tensors.values()]
        if "whole" in load.record:
            return carried
        nested = {name: set(keys) for name, keys in load.record.get("nested", {}).items()}
        optim.allocate(self.optimizer, slots, load.states, load.values, load.record, load.same_dtype, load.kept, load.shapes, nested)
        scalars = {shard.name for shard in load.scalars}
        shards = optim.state_shards(self.prefix, self.optimizer, slots, frozen)
        return [shard for shard in shards if shard.name not in scalars] + carried

    def restore(self, slots: Sequence[Slot], resolve: Mapping[str, str], *, scheduled: bool) -> None:
        """After the tensors are filled: everything that is not laid out by parameter, then hyper-parameters."""
        load = self.load
        if "whole" in load.record:
            self.optimizer.load_state_dict(self._value(load.record["whole"]))
        else:
            optim.apply_scalars(self.optimizer, slots, load.values, load.states)
            self._restore_nested(slots, resolve)
        if self.is_same_class:
            self._attributes.restore(load.record.get("attributes", {}))
        optim.apply_hyper_parameters(self.optimizer, load.hyper_parameters, same_class=self.is_same_class, scheduled=scheduled)
        if load.unseen:
            optim.watch_first_step(self.optimizer)

    def _restore_nested(self, slots: Sequence[Slot], resolve: Mapping[str, str]) -> None:
        state, stored = self.optimizer.state, self.load.record.get("nested", {})
        for slot in slots:
            for key, plain in stored.get(resolve.get(slot.piece.name, slot.piece.name), {}).items():
                state[slot.holder][key] = self._value(plain)
        if not self.is_same_class:
            return
        loose: dict[Any, Any] = {self._value(key): value for key, value in self.load.record.get("loose", [])}
        for key in optim.loose_keys(self.optimizer, slots):
            if key not in loose:
                del state[key]
        for key, plain in loose.items():
            state[key] = self._value(plain)

    def _value(self, plain: Any) -> Any:
        device = next((p.device for group in self.optimizer.param_groups for p in group["params"]), None)
        return unflatten(plain, lambda reference: self.load.tensors[reference.name][0], device)

    def explain(self, captured: CapturedOptimizer, resolve: Mapping[str, str]) -> list[tuple[str, Any, Any]]:
        """After a resume: return where the live state is not what the checkpoint and this run's settings make of it."""
        load, owner = self.load, self.name
        carried, _ = self.carried(captured)
        live, found = self.record(captured, carried), list[tuple[str, Any, Any]]()
        for number, values in load.hyper_parameters.items():
            mine = live["groups"][number]["values"]
            for key, value in values.items():
                if key in mine and not optim.same_value(mine[key], value):
                    found.append((f"{owner}.param_groups.{number}.{key}", value, mine[key]))
                elif key not in mine and self.is_same_class:
                    found.append((f"{owner}.param_groups.{number}.{key}", value, None))
        if not self.is_same_class:
            return found
        for key in ("whole", "nested", "loose", "attributes"):
            theirs, mine = load.record.get(key), live.get(key)
            if key == "nested":
                theirs = {name: (theirs or {}).get(resolve.get(name, name)) for name in {s.piece.name for s in captured.slots}}
                theirs = {name: value for name, value in theirs.items() if value and name not in load.kept}
                mine = {name: value for name, value in (mine or {}).items() if name not in load.kept}
            if key == "attributes":  # one that held code when it was saved is not stored
                mine = {name: value for name, value in (mine or {}).items() if name in (theirs or {})}
            if key == "whole" and isinstance(theirs, dict) and isinstance(mine, dict):
                theirs, mine = ({k: v for k, v in side.items() if k != "param_groups"} for side in (theirs, mine))
            found += [(f"{owner}.{path or key}", a, b) for path, a, b in differing(self._as_here(theirs, mine) or None, mine or None)]
        names = {slot.piece.name for slot in captured.slots} - load.kept
        scalars = {name: {k: v for k, v in load.values.get(name, {}).items()} for name in names}
        for shard in captured.shards:
            fqn, _, key = shard.name.removeprefix(self.prefix).rpartition(".")
            local = shard.locals[0]
            if fqn in names and key in scalars[fqn] and local is not None and local.numel() == 1 and local.item() != scalars[fqn][key]:
                found.append((f"{owner}.state.{fqn}.{key}", scalars[fqn][key], local.item()))
        for name, values in live["scalars"].items():
            if name in names and encode_record(values) != encode_record({k: v for k, v in scalars[name].items() if k in values}):
                found += [(f"{owner}.state.{name}.{path}", a, b) for path, a, b in differing({k: scalars[name].get(k) for k in values}, values)]
        return found

    def _as_here(self, stored: Any, live: Any) -> Any:
        """Return a stored value with the tensors in the record that are in it here: where they were DTensors, they were not."""
        if isinstance(stored, dict) and isinstance(live, dict):
            return {key: self._as_here(value, live.get(key)) for key, value in stored.items()}
        if isinstance(stored, list | tuple) and isinstance(live, list | tuple) and len(stored) == len(live):
            return type(stored)(self._as_here(a, b) for a, b in zip(stored, live, strict=True))
        if isinstance(stored, Typed):
            if stored.kind == "dtensor" and not (isinstance(live, Typed) and live.kind == "dtensor"):
                return self._as_here(stored.value[0], live)
            if isinstance(live, Typed) and live.kind == stored.kind:
                return Typed(stored.kind, self._as_here(stored.value, live.value))
        if isinstance(stored, Reference) and isinstance(live, Array) and stored.name in self.load.tensors:
            return small_array(local_of(self.load.tensors[stored.name][0]))
        return stored


def _has_dtype(stored: LogicalTensor | None, piece: Piece) -> bool:
    return stored is not None and stored.dtype == dtype_name(piece.local.dtype)
