"""Adapter for DeepSpeed engines: ZeRO stages 0 to 3, in fp32, bf16 (both optimizers) and fp16.

The attributes read here are DeepSpeed's internals (0.19); ``Member`` compares every master with its low-precision copy on
attach, so a release that lays them out differently is an error there and not a wrong checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.errors import CheckpointCorrupt, LayoutError, UsageError
from engine.format.layout import Flat, Mesh, mesh_of
from engine.state.names import Names, unwrap
from engine.state.optimizers import Part, parts_of, unwrap_scheduler
from engine.state.plain import local_of, replicated
from engine.state.source import Piece, Slot
from engine.state.values import flatten, refuse, small_array, unflatten

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class ZeroAdapter:
    """``engine`` is what ``deepspeed.initialize`` returned; ``schedulers`` are stepped by the loop, beside the engine's own."""

    def __init__(self, engine: Any, optimizers: Sequence[Any] = (), schedulers: Sequence[Any] = ()) -> None:
        self._engine = engine
        _refuse_outside(engine, optimizers)
        self.module = unwrap(engine.module)
        self.names = Names(self.module)
        own = [unwrap_scheduler(engine.lr_scheduler)] if engine.lr_scheduler is not None else []
        self.schedulers = own + [scheduler for scheduler in schedulers if not any(scheduler is known for known in own)]
        self._wrapper = engine.optimizer
        stage = engine.zero_optimization_stage()
        self.engine = f"zero{stage}"
        optimizer = _innermost(self._wrapper)
        self.parts = parts_of([optimizer]) if optimizer is not None else []
        _refuse_unknown(engine, stage, self._wrapper, self.parts)
        self._partition = _partition_of(stage, self._wrapper)(self._wrapper, self.names)

    def slots(self) -> list[Slot]:
        return self._partition.slots()

    def others(self) -> list[Piece]:
        optimized = {slot.piece.name for slot in self.slots()}
        return [_frozen(name, p) for name, p in self.names.parameters.items() if name not in optimized]

    def anchors(self) -> list[torch.Tensor]:
        return self._partition.anchors()

    def reshard(self) -> None:
        """ZeRO replaces no parameter object."""

    def pending(self) -> str:
        done, of = self._engine.micro_steps % self._engine.gradient_accumulation_steps(), self._engine.gradient_accumulation_steps()
        return f"gradient accumulation: {done} of {of} micro-batches are in" if done else ""

    def counters(self) -> dict[str, Any]:
        if pending := self.pending():
            raise UsageError(f"inside {pending}; accumulated gradients are not part of a checkpoint. Wait for the step at the boundary")
        found: dict[str, Any] = {name: int(getattr(self._engine, name)) for name in _COUNTERS}
        scaler = self._scaler()
        if _is_dynamic(scaler):
            found["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
        for name, stateful in self._stateful():
            found[name] = flatten(
                stateful.state_dict(), name, lambda _, tensor: small_array(tensor), refuse(f"DeepSpeed's {type(stateful).__name__}")
            )
        return found

    def _stateful(self) -> list[tuple[str, Any]]:
        """Return what DeepSpeed gives a state of its own: the scaler of ``torch_autocast`` in fp16, the schedule of random layer-token drop,
        and the sampler of curriculum learning."""
        sampler = getattr(getattr(self._engine, "training_dataloader", None), "data_sampler", None)
        found = [
            ("torch_autocast_scaler", getattr(self._wrapper, "torch_autocast_gradscaler", None)),
            ("random_ltd", getattr(self._engine, "random_ltd_scheduler", None)),
            ("data_sampler", sampler if type(sampler).__name__ == "DeepSpeedDataSampler" else None),
        ]
        return [(name, stateful) for name, stateful in found if stateful is not None]

    def _scaler(self) -> Any:
        """Stages 1 to 3 keep it in ``loss_scaler``, stage 0's wrappers in ``loss_scale_config``."""
        return getattr(self._wrapper, "loss_scaler", None) or getattr(self._wrapper, "loss_scale_config", None)

    def set_counters(self, counters: dict[str, Any]) -> None:
        steps = counters["global_steps"]
        accumulation = self._engine.gradient_accumulation_steps()
        self._engine.global_steps = steps
        self._engine.global_samples = counters.get("global_samples", steps * self._engine.train_batch_size())
        self._engine.skipped_steps = counters.get("skipped_steps", 0)
        micro_steps = counters.get("micro_steps", steps * accumulation)
        self._engine.micro_steps = micro_steps if micro_steps % accumulation == 0 else steps * accumulation
        scaler = self._scaler()
        if _is_dynamic(scaler):  # a static scale, and that of another precision, is configuration
            for name, value in counters.get("loss_scaler", {}).items():
                setattr(scaler, name, value)
        for name, stateful in self._stateful():
            if counters.get(name):
                stateful.load_state_dict(unflatten(counters[name], _no_tensor))

    @torch.no_grad()
    def publish(self) -> None:
        self._partition.publish()


def _refuse_outside(engine: Any, optimizers: Sequence[Any]) -> None:
    """Raise :class:`UsageError` for an optimizer beside DeepSpeed's that is not a wrapper of it, as Accelerate's is."""
    for optimizer in optimizers:
        if optimizer is not engine.optimizer and getattr(optimizer, "optimizer", None) is not engine.optimizer:
            raise UsageError(f"a {type(optimizer).__name__} beside a DeepSpeed engine, which has an optimizer of its own; give the engine alone")


def _no_tensor(reference: Any) -> Any:
    raise CheckpointCorrupt(f"DeepSpeed's counters refer to a tensor {reference.name}, which none of them has")


def _refuse_unknown(engine: Any, stage: int, wrapper: Any, parts: list[Part]) -> None:
    """Raise :class:`UsageError` for state of DeepSpeed's that this version does not know how to save."""
    if getattr(wrapper, "backup_optimizer", None) is not None:
        raise UsageError(
            "DeepSpeed's Twin-Flow (offload_optimizer with a ratio below 1) keeps moments in a second optimizer, which this version cannot "
            "save. Set the ratio to 1.0"
        )
    for part in parts:
        kind = type(part.optimizer).__name__
        if stage in (1, 2) and "muon" in kind.lower() and any(getattr(p, "use_muon", False) for p in engine.module.parameters()):
            raise UsageError(
                f"{kind} at ZeRO stage {stage} keeps the momentum of whole parameters, not aligned to the ranks' partitions, so it cannot be "
                "resharded. Use ZeRO stage 3, or torch.optim.Muon under FSDP2 or DDP"
            )
        if any(word in kind for word in ("Onebit", "ZeroOne")):
            raise UsageError(f"{kind} keeps an error of compression per rank, which this version cannot save. Use AdamW or Lamb")


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def _innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _partition_of(stage: int, wrapper: Any) -> type:
    kind = type(wrapper).__name__
    if stage == 3 and kind == "DeepSpeedZeroOptimizer_Stage3":
        return _Stage3
    if kind == "DeepSpeedZeRoOffload":
        return _Stage3Weights
    if kind == "BF16_Optimizer":
        return _BF16
    if stage in (1, 2) and kind == "DeepSpeedZeroOptimizer":
        return _Stage12
    if stage == 0 and (isinstance(wrapper, torch.optim.Optimizer) or wrapper is None):
        return _Whole
    if stage == 0 and kind == "FP16_UnfusedOptimizer":
        return _WholeMasters
    if stage == 0 and kind == "FP16_Optimizer":
        return _FlatMasters
    raise LayoutError(f"DeepSpeed's {kind} at ZeRO stage {stage} is not known to this version; stages 0 to 3 with a torch-style optimizer are")


def _frozen(name: str, parameter: Any) -> Piece:
    if not hasattr(parameter, "ds_tensor"):
        return Piece(name, tuple(parameter.shape), replicated(), local_of(parameter))
    layout, start, stop = _stage3_rule(parameter)
    return Piece(name, tuple(parameter.ds_shape), layout, parameter.ds_tensor.detach().view(-1).narrow(0, 0, stop - start))


def _mesh(group: Any) -> Mesh:
    ranks = tuple(dist.get_process_group_ranks(group))
    return mesh_of((len(ranks),), ranks)


class _Whole:
    """Stage 0 in fp32: the optimizer holds the module's own parameters."""

    def anchors(self) -> list[torch.Tensor]:
        return []

    def __init__(self, wrapper: Any, names: Names) -> None:
        self.wrapper = wrapper
        self.names = names

    def slots(self) -> list[Slot]:
        groups = self.wrapper.param_groups if self.wrapper else []
        return [self._slot(p, p, i) for i, group in enumerate(groups) for p in group["params"]]

    def _slot(self, parameter: nn.Parameter, master: torch.Tensor, group: int) -> Slot:
        low = parameter.detach() if master is not parameter else None
        return Slot(Piece(self.names.of(parameter), tuple(parameter.shape), replicated(), master.detach(), low), master, group)

    def publish(self) -> None:
        """Parameters are their own masters."""


class _WholeMasters(_Whole):
    """Stage 0 in bf16 or fp16 with an unfused optimizer: a whole fp32 master a parameter."""

    def anchors(self) -> list[torch.Tensor]:
        return [master for group in self.wrapper.fp32_groups for master in group]

    def slots(self) -> list[Slot]:
        w = self.wrapper
        return [
            self._slot(p, master, i)
            for i, (low, high) in enumerate(zip(w.fp16_groups, w.fp32_groups, strict=True))
            for p, master in zip(low, high, strict=True)
        ]

    def publish(self) -> None:
        for slot in self.slots():
            assert slot.piece.low is not None
            slot.piece.low.copy_(slot.piece.local)


class _Flats:
    """Parameters lie one after another in flat fp32 buffers, each the only parameter of its optimizer group."""

    def __init__(self, wrapper: Any, names: Names) -> None:
        self.wrapper = wrapper
        self.names = names

    def _slots(self, group: int, flat: torch.Tensor, mesh: Mesh, position: int, parameters: list[nn.Parameter], offsets: list[int]) -> list[Slot]:
        """``offsets``: where each parameter begins in the buffer that all ranks' ``flat`` make together."""
        slots, chunk = [], flat.numel()
        for parameter, offset in zip(parameters, offsets, strict=True):
            begin, end = position * chunk, (position + 1) * chunk
            start = min(max(offset, begin), end) - begin
            length = min(max(offset + parameter.numel(), begin), end) - begin - start
            low = parameter.detach().reshape(-1).narrow(0, begin + start - offset, length) if length else None
            piece = Piece(self.names.of(parameter), tuple(parameter.shape), Flat(mesh, offset, chunk), flat.detach().narrow(0, start, length), low)
            slots.append(Slot(piece, flat, group, (start, length)))
        return slots


class _Stage12(_Flats):
    """DeepSpeedZeroOptimizer: each rank owns one chunk of each group's flat buffer. The order is that of
    ``round_robin_bit16_groups``, with the optimizer's own offsets (alignment leaves gaps)."""

    def anchors(self) -> list[torch.Tensor]:
        return list(self.wrapper.single_partition_of_fp32_groups)

    def slots(self) -> list[Slot]:
        w, slots = self.wrapper, []
        for i, flat in enumerate(w.single_partition_of_fp32_groups):
            group = w.real_dp_process_group[i]
            order, offsets = w.round_robin_bit16_groups[i], w.round_robin_bit16_offsets[i]
            slots += self._slots(i, flat, _mesh(group), dist.get_rank(group), order, [int(o) for o in offsets])
        return slots

    def publish(self) -> None:
        self.wrapper.update_lp_params()
        _relink(self.wrapper)


class _BF16(_Flats):
    """BF16_Optimizer: stage 1 in bf16 with fp32 gradient accumulation. Parameters lie in group order without gaps."""

    def anchors(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_groups_flat_partition)

    def slots(self) -> list[Slot]:
        w, slots = self.wrapper, []
        for i, flat in enumerate(w.fp32_groups_flat_partition):
            group = w.real_dp_process_group[i]
            slots += self._slots(i, flat, _mesh(group), dist.get_rank(group), w.bf16_groups[i], _running([p.numel() for p in w.bf16_groups[i]]))
        return slots

    def publish(self) -> None:
        self.wrapper.update_lp_params()
        _relink(self.wrapper)


def _relink(wrapper: Any) -> None:
    """DeepSpeed's per-parameter views of the moments may be older than the moments; without moments it links them after a step."""
    wrapper._hp_optimizer_states_linked = False
    if any(wrapper.optimizer.state.values()):
        wrapper._lazy_init_hp_params_optimizer_state()


class _FlatMasters(_Flats):
    """Stage 0 in bf16 or fp16 with a fused optimizer: one flat fp32 master a group, whole on every rank."""

    def anchors(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_groups_flat)

    def slots(self) -> list[Slot]:
        w, slots = self.wrapper, []
        for i, flat in enumerate(w.fp32_groups_flat):
            for p, offset in zip(w.fp16_groups[i], _running([p.numel() for p in w.fp16_groups[i]]), strict=True):
                local = flat.detach().narrow(0, offset, p.numel()).view(p.shape)
                slots.append(Slot(Piece(self.names.of(p), tuple(p.shape), replicated(), local, p.detach()), flat, i, (offset, p.numel())))
        return slots

    def publish(self) -> None:
        for slot in self.slots():
            assert slot.piece.low is not None
            slot.piece.low.copy_(slot.piece.local)


class _Stage3:
    """Each parameter is cut on its own; the rank's chunks of a sub-group lie one after another in one flat buffer."""

    def __init__(self, wrapper: Any, names: Names) -> None:
        self.wrapper = wrapper
        self.names = names

    def anchors(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def slots(self) -> list[Slot]:
        w, slots = self.wrapper, []
        for i, parameters in enumerate(w.fp16_groups):
            flat, offset = w.fp32_partitioned_groups_flat[i], 0
            for p in parameters:
                layout, start, stop = _stage3_rule(p)
                length = stop - start
                low = p.ds_tensor.detach().view(-1).narrow(0, 0, length)
                piece = Piece(self.names.of(p), tuple(p.ds_shape), layout, flat.detach().narrow(0, offset, length), low)
                slots.append(Slot(piece, flat, w.sub_group_to_group_id[i], (offset, length)))
                offset += layout.chunk
            if offset > flat.numel():
                raise LayoutError(f"ZeRO-3 sub-group {i}: its parameters' chunks have {offset} elements, its flat buffer {flat.numel()}")
        return slots

    def publish(self) -> None:
        w = self.wrapper
        w.checkpoint_event_prologue()
        for i in range(len(w.fp16_groups)):
            w.fp16_partitioned_groups_flat[i].copy_(w.fp32_partitioned_groups_flat[i])
            w._unflatten_partitioned_parameters(i)
        w.checkpoint_event_epilogue()
        _forget_secondary_copies(self.names)


class _Stage3Weights:
    """Stage 3 without an optimizer (a reference or reward model): all parameters are cut, none has a master."""

    def __init__(self, wrapper: Any, names: Names) -> None:
        self.wrapper = wrapper
        self.names = names

    def anchors(self) -> list[torch.Tensor]:
        return []

    def slots(self) -> list[Slot]:
        return []

    def publish(self) -> None:
        self.wrapper.partition_all_parameters()
        _forget_secondary_copies(self.names)
        if self.wrapper.persistent_parameters:
            self.wrapper.persistent_parameters[0].all_gather(self.wrapper.persistent_parameters)


def _stage3_rule(parameter: Any) -> tuple[Flat, int, int]:
    """The layout of a ZeRO-3 parameter and this rank's interval of it. The chunk's tail past the interval is padding."""
    if hasattr(parameter.ds_tensor, "ds_quant_scale"):
        raise UsageError("zero_quantized_nontrainable_weights keeps codes with scales of their own; this version cannot save them. Turn it off")
    group = parameter.ds_process_group
    chunk, numel, position = int(parameter.ds_tensor.ds_numel), int(parameter.ds_numel), dist.get_rank(group)
    return Flat(_mesh(group), 0, chunk), min(position * chunk, numel), min((position + 1) * chunk, numel)


def _forget_secondary_copies(names: Names) -> None:
    """hpZ's, from which forwards would gather the replaced weights; DeepSpeed itself forgets only trainable parameters'."""
    parameters: Any = names.parameters.values()
    for parameter in parameters:
        parameter.ds_secondary_tensor = None


def _running(sizes: list[int]) -> list[int]:
    totals, total = [], 0
    for size in sizes:
        totals.append(total)
        total += size
    return totals
