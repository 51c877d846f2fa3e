"""What the ranks of one save have agreed on, and for how long it serves. Every rank computes the same from the same tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from engine import dcp
from engine.errors import UsageError
from engine.format.checksum import digest
from engine.format.layout import LogicalTensor
from engine.format.names import name_problem
from engine.plan.assign import Frozen, assign_writers, place_frozen
from engine.plan.order import reading_order
from engine.state.shard import Shard
from engine.transfer import replicas


@dataclass(frozen=True)
class GlobalPlan:
    """The logical tensors with their writers, and the digest that ranks compare. ``listed`` are the same in the manifest's order, with
    the number and the geometry class of each; ``shared`` are the places of replicated ones, ``turns`` the same in samples. ``frozen`` are
    parts of tensors that nobody trains, which get files of their own. ``planner`` is this rank's."""

    described: tuple[LogicalTensor, ...]
    frozen: frozenset[Frozen]
    assigned: tuple[LogicalTensor, ...]
    digest: bytes
    listed: tuple[LogicalTensor, ...]
    numbers: Mapping[str, int]
    classes: Sequence[int]
    has_frozen: bool
    shared: Sequence[int]
    turns: Sequence[Sequence[int]]
    planner: dcp.ShardSavePlanner


def make_plan(described: tuple[LogicalTensor, ...], rank: int, frozen: frozenset[Frozen] = frozenset(), world_size: int = 1) -> GlobalPlan:
    """Raises :class:`UsageError` where two tensors have one name, or one has a name that no tensor may have."""
    names = [tensor.name for tensor in described]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"two tensors are both called {twice[0]}; give members other names")
    if odd := next((name for name in names if name_problem(name)), None):
        raise UsageError(f"a tensor is called {odd[:200]!r}, {name_problem(odd)}; rename it")
    assigned = assign_writers(described)
    placed = place_frozen(assigned, frozen, world_size)
    has_frozen = placed != assigned
    order, classes = reading_order(placed, world_size if has_frozen else None)
    listed = tuple(placed[place] for place in order)
    numbers = {tensor.name: number for number, tensor in enumerate(listed)}
    planner = dcp.ShardSavePlanner(placed, rank, world_size if has_frozen else dcp.NO_FROZEN)
    shared = replicas.shares(described)
    turns, agreed = replicas.turns(described, shared), digest(msgspec.msgpack.encode(listed))
    return GlobalPlan(described, frozen, placed, agreed, listed, numbers, classes, has_frozen, shared, turns, planner)


class Plans:
    """A checkpointer's plans: the last one serves while tensors stay alike.

    What was taken for frozen and is found to change (an EMA, a teacher) moves to the files of what is trained. Ranks hear of it when a
    save ends, which they do at different times; so it counts from the save on before which all must have heard: ``max_in_flight`` later.
    """

    def __init__(self, rank: int, world_size: int, max_in_flight: int) -> None:
        self._rank, self._world_size, self._max_in_flight = rank, world_size, max_in_flight
        self.last: GlobalPlan | None = None
        self._described: tuple[list[Shard], tuple[LogicalTensor, ...]] = ([], ())
        self._changed: dict[int, set[str]] = {}
        self._restless: set[str] = set()
        self._resumed_at = -1

    def plan(self, shards: list[Shard], frozen: frozenset[Frozen], count: int) -> GlobalPlan:
        """For the save number ``count`` of this checkpointer."""
        described = self._described[1] if shards is self._described[0] else tuple(shard.tensor for shard in shards)
        self._described = (shards, described)
        for heard in [heard for heard in list(self._changed) if heard < count - self._max_in_flight]:
            self._restless |= self._changed.pop(heard)
        if self._restless:
            frozen = frozenset(part for part in frozen if part[0] not in self._restless)
        if self.last is None or self.last.described != described or self.last.frozen != frozen:
            self.last = make_plan(described, self._rank, frozen, self._world_size)
        return self.last

    def note_changed(self, count: int, plan: GlobalPlan, numbers: Sequence[int]) -> None:
        """At the save ``count`` tensors of these numbers in ``plan``, taken for frozen, had changed. Called from any thread."""
        if numbers and count != self._resumed_at:
            self._changed[count] = {plan.listed[number].name for number in numbers}

    def note_resume(self, count: int) -> None:
        """What differs at the save ``count`` was replaced by a resume: that is no change."""
        self._resumed_at = count
