"""The seam between engines and the checkpoint: an adapter says where the state lives, everything else is common."""

from typing import Any, Protocol

import torch
from msgspec import Struct
from torch import nn

from engine.format.layout import Layout
from engine.state.names import Names
from engine.state.optimizers import Part
from engine.state.parts import Place


class Piece(Struct, frozen=True, gc=False):
    """A parameter as the checkpoint sees it. ``local`` is this rank's live storage (the fp32 master where there is one): N-D for
    a Grid layout, 1-D for Flat. ``low`` is the live low-precision copy of the same elements, where there is one. ``place``, where the
    parameter is a box of a larger tensor; ``name`` is that tensor's then, ``shape`` and ``layout`` are the parameter's own."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    local: torch.Tensor
    low: torch.Tensor | None = None
    place: Place | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the logical tensor."""
        return self.place.whole if self.place else self.shape


class Slot(Struct, frozen=True, gc=False):
    """A parameter's place in an optimizer, the adapter's number ``part``: ``optimizer.state[holder]`` is its state, in
    ``param_groups[group]``.

    ``cut`` is its (offset, length) in a holder that several parameters share (ZeRO's flat buffers), None where the holder is
    the parameter's own. State tensors as long as the holder are cut alike and laid out like the parameter.
    """

    piece: Piece
    holder: torch.Tensor
    group: int
    cut: tuple[int, int] | None = None
    part: int = 0


class Adapter(Protocol):
    """Where one engine keeps its state. Adapters enumerate live storage on each call; they keep no copies. They name parameters as the
    module does; ``names.placed`` makes boxes of larger tensors of those that are."""

    engine: str
    module: nn.Module
    names: Names
    parts: list[Part]
    schedulers: list[Any]

    def slots(self) -> list[Slot]:
        """Every parameter that an optimizer group holds, also where this rank's share of it is empty."""
        ...

    def others(self) -> list[Piece]:
        """Every other parameter: frozen, or in no optimizer."""
        ...

    def anchors(self) -> list[torch.Tensor]:
        """Live tensors, beside the module's parameters, that slots are views of: where one is replaced, slots are others."""
        ...

    def reshard(self) -> None:
        """Bring the sharded parameters back where a forward has put whole ones in their place. Local."""
        ...

    def pending(self) -> str:
        """What is under way that must end before state can be saved, worded for a message: gradient accumulation. Empty: nothing."""
        ...

    def counters(self) -> dict[str, Any]:
        """The engine's own counters and loss-scaler scalars. Raises :class:`UsageError` where state cannot be saved now."""
        ...

    def set_counters(self, counters: dict[str, Any]) -> None: ...

    def publish(self) -> None:
        """Derive what training computes with from the restored masters. A collective: every rank calls it, once a load."""
        ...
