"""Members that are not models: anything with ``state_dict`` and ``load_state_dict``, such as a sampler, a grad scaler, an EMA.

Tensors in such a state become logical tensors of their own, saved and loaded like a model's; the rest goes into the typed record.
All ranks must have the same state, but for those in :class:`PerRank`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import IncompatibleCheckpoint
from engine.format.layout import LogicalTensor
from engine.state.carried import Carried, LoadedTensors, targets
from engine.state.shard import Shard
from engine.state.values import differing, flatten, references, refuse, unflatten


class PerRank:
    """A member of which each rank has a state of its own: ``Checkpointer(run, loader=PerRank(loader))``.

    It is restored rank by rank, so only at the world size it was saved at; elsewhere a resume says so, unless ``allow_missing`` names
    the member, which then starts fresh. torchdata's ``StatefulDataLoader`` is taken for one by itself. Ranks may have tensors of
    different number and shape: each save exchanges their descriptions first, one round through the job's store.
    """

    def __init__(self, target: Any) -> None:
        self.target = target


class ObjectMember:
    """One such member. ``per_rank``: see :class:`PerRank`."""

    def __init__(self, name: str, member: Any, rank: int = 0) -> None:
        self.name = name
        self.target = member.target if isinstance(member, PerRank) else member
        self._is_loader = any(kind.__name__ == "StatefulDataLoader" for kind in type(self.target).__mro__)
        self.per_rank = isinstance(member, PerRank) or self._is_loader
        self._rank = rank if self.per_rank else None

    def capture(self) -> tuple[Any, list[Shard]]:
        """Return its state as plain values, and its tensors."""
        carried = Carried(self.name, rank=self._rank) if self.per_rank else Carried(self.name, small_bytes=-1)
        plain = carried.flatten(self.target.state_dict(), "", self._unknown)
        if self.per_rank and hasattr(self.target, "num_workers"):
            plain = {"num_workers": self.target.num_workers, "state": plain}
        return plain, carried.shards

    def _unknown(self, path: str, value: Any) -> Any:
        return refuse(f"member '{self.name}' ({type(self.target).__name__})")(f"state_dict(){path}", value)

    def has_state(self) -> bool:
        """Return whether there is any state now: a disabled grad scaler has none."""
        return self._is_loader or self.target.state_dict() != {}  # reading a loader's state begins an epoch

    def check(self, plain: Any) -> None:
        """Check before anything changes. Raises :class:`IncompatibleCheckpoint` where the state cannot be taken over."""
        if self.per_rank and hasattr(self.target, "num_workers"):
            saved = plain.get("num_workers") if isinstance(plain, dict) else None
            if saved != self.target.num_workers:
                raise IncompatibleCheckpoint(
                    f"member '{self.name}' has num_workers={self.target.num_workers} here, {saved} in the checkpoint; its position is kept "
                    f"worker by worker, so give it {saved} workers, or use an ElasticSampler, which has no such limit"
                )
            return
        if hasattr(self.target, "check_state_dict"):
            self.target.check_state_dict(plain)

    def targets(self, plain: Any, stored: dict[str, LogicalTensor], meshes: Sequence[Any]) -> LoadedTensors:
        """Return new tensors for those the stored state refers to, placed as the live state's are."""
        if not references(plain):
            return {}  # asking for the live state may have effects: torchdata's loader begins an epoch
        live: dict[str, torch.Tensor] = {}

        def note(path: str, tensor: torch.Tensor) -> Any:
            live[f"{self.name}{path}" if self._rank is None else f"{self.name}.rank_{self._rank:05d}{path}"] = tensor

        flatten(self.target.state_dict(), "", note, lambda path, value: None)
        return targets(plain, stored, f"member '{self.name}'", meshes, live, self._rank)

    def restore(self, plain: Any, tensors: LoadedTensors, device: torch.device | None = None) -> None:
        state = unflatten(plain, lambda reference: tensors[reference.name][0], device)
        if self.per_rank and hasattr(self.target, "num_workers"):
            if state["num_workers"] and state["state"].get("_iterator_finished"):
                return  # torchdata would draw the whole next epoch into an iterator and discard it
            state = state["state"]
        self.target.load_state_dict(state)

    def explain(self, plain: Any, captured: Any) -> list[tuple[str, Any, Any]]:
        """Return where the state after a resume differs from the stored one, as (path, stored, live).

        An object that checks states itself may take them over in its own way (another batch size).
        """
        if self._is_loader or hasattr(self.target, "check_state_dict"):
            return []
        return [(f"{self.name}.{path}".rstrip("."), a, b) for path, a, b in differing(plain, captured)]
