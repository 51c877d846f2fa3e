"""Rows that stay as they are, to the bit, in a model that cannot be changed, whatever engine and optimizer train it.

A gradient of zero is not enough: weight decay and momentum move a row without one (and under FSDP2 a hook on a parameter's gradient never
fires). So the gradient is masked, for the norm that clips it and for the others' sake, and the rows are put back after each step.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from engine.errors import UsageError
from engine.state import optimizer as optim
from engine.state.pick import adapter_for
from engine.state.plain import local_of
from engine.state.source import Slot


def freeze_rows(member: Any, rows: Mapping[str, int]) -> "FrozenRows":
    """Rows [0, n) of each parameter named are trained no more: bit for bit they are what they were before each optimizer step. Gradients
    of these rows become zero before anything reads them, whatever they are.

    Args:
        member: a DeepSpeed engine, or a tuple ``(module, optimizer)``; after ``deepspeed.initialize`` or ``fully_shard``, at any time, also
            where the optimizer has momentum already.
        rows: by parameter, its FQN or the end of it, how many: ``{"text_embedding.weight": 12000, "text_head.bias": 12000}``. Of tied
            parameters one name serves.

    What it costs: the gradient and the optimizer's state of these rows are still made, and each step copies the rows out and back. A
    module whose weight is two parameters (``engine_kernels.convert``) has none of it.

    Every rank calls this. Raises :class:`UsageError` for a name that no parameter or several have, more rows than there are, a parameter that
    no optimizer holds, and inside gradient accumulation.
    """
    return FrozenRows(member, rows)


class FrozenRows:
    """What :func:`freeze_rows` has set up. :meth:`remove` ends it."""

    def __init__(self, member: Any, rows: Mapping[str, int]) -> None:
        self._adapter = adapter = adapter_for("model", member)
        if not adapter.parts:
            raise UsageError("there is no optimizer: nothing would change the rows. Give the DeepSpeed engine, or (module, optimizer)")
        if told := adapter.pending():
            raise UsageError(f"inside {told}; rows can be frozen between two steps")
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._rows = {self._find(name): count for name, count in rows.items()}
        self._look()
        for slot in self._slots:
            for view in self._state_views(slot):
                view.zero_()  # momentum that nobody uses would fade into denormal numbers, which are slow
        self._handles = [handle for name in self._rows for handle in self._mask(name)]
        for part in adapter.parts:
            self._handles += [part.optimizer.register_step_pre_hook(self._keep), part.optimizer.register_step_post_hook(self._restore)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _find(self, name: str) -> str:
        names = self._adapter.names
        known = {**{own: own for own in names.parameters}, **names.aliases}
        found = [known[name]] if name in known else sorted({own for other, own in known.items() if other.endswith(f".{name}")})
        if len(found) != 1:
            what = f"{len(found)} parameters end in it: {', '.join(found[:8])}" if found else "there is none"
            raise UsageError(f"{name!r} does not name a parameter of the model: {what}")
        if found[0] in names.places:
            raise UsageError(f"{found[0]} is a part of {names.places[found[0]].name} already: freeze its rows with requires_grad=False")
        return found[0]

    def _look(self) -> None:
        """Where the rows lie, and memory to keep them in meanwhile."""
        self._slots = [slot for slot in self._adapter.slots() if slot.piece.name in self._rows]
        odd = self._rows.keys() - {slot.piece.name for slot in self._slots}
        if odd:
            raise UsageError(f"{min(odd)} is in no optimizer: as a whole it is frozen already, or trained by nobody")
        for slot in self._slots:
            if not slot.piece.shape or not 0 <= self._rows[slot.piece.name] <= slot.piece.shape[0]:
                raise UsageError(f"{slot.piece.name} has shape {list(slot.piece.shape)}; {self._rows[slot.piece.name]} of its rows cannot be frozen")
        self._where = self._whereabouts()
        self._views = {id(slot): list(self._frozen(slot, slot.piece.local)) for slot in self._slots}
        self._kept = {number: [torch.empty_like(view) for view in views] for number, views in self._views.items()}

    def _whereabouts(self) -> list[int]:
        return [id(anchor) for anchor in self._adapter.anchors()] + [local_of(slot.holder).data_ptr() for slot in self._slots]

    def _frozen(self, slot: Slot, local: torch.Tensor) -> Iterator[torch.Tensor]:
        """The frozen rows' part of what this rank holds of a tensor that is laid out as the slot's parameter."""
        piece = slot.piece
        for box, view in optim.tensor_shard(piece.name, piece.shape, piece.layout, local).held(self._rank):
            count = min(self._rows[piece.name] - box.offsets[0], box.sizes[0])
            if count > 0 and box.numel:
                yield view.narrow(0, 0, count)

    def _state_views(self, slot: Slot) -> Iterator[torch.Tensor]:
        for value in self._adapter.parts[slot.part].optimizer.state.get(slot.holder, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == slot.holder.shape and value.ndim:
                local = local_of(value)
                yield from self._frozen(slot, local.view(-1).narrow(0, *slot.cut) if slot.cut else local)

    def _mask(self, name: str) -> list[Any]:
        """Hooks that make the gradient of the rows zero, as early as the engine lets them."""
        parameter: Any = self._adapter.names.parameters[name]
        slot = next(slot for slot in self._slots if slot.piece.name == name)
        if isinstance(parameter, DTensor):
            clear = _clear_gradient(lambda grad: self._frozen(slot, local_of(grad)))
            clear(parameter)
            return [parameter.register_post_accumulate_grad_hook(clear)]
        count = self._rows[name]
        if parameter.grad is not None:
            parameter.grad[:count].zero_()

        def masked(grad: torch.Tensor) -> torch.Tensor:
            kept = torch.zeros_like(grad)
            kept[count:] = grad[count:]  # by choice, not by a factor: 0 · inf is NaN
            return kept

        return [parameter.register_hook(masked)]

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._where != self._whereabouts():
            self._look()
        for number in self._stepping(optimizer):
            torch._foreach_copy_(self._kept[number], self._views[number])

    @torch.no_grad()
    def _restore(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for number in self._stepping(optimizer):
            torch._foreach_copy_(self._views[number], self._kept[number])

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """What this step may change: ZeRO-3 steps one sub-group after another."""
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return (id(slot) for slot in self._slots if id(slot.holder) in present and self._views[id(slot)])


def _clear_gradient(frozen: Callable[[torch.Tensor], Iterator[torch.Tensor]]) -> Callable[[torch.Tensor], None]:
    def clear(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            for view in frozen(parameter.grad):
                view.zero_()

    return clear
