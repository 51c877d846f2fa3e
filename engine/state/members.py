"""All members of one checkpointer: models and other objects, as the shards, targets and records of the two pipelines."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine.errors import UsageError
from engine.format.layout import LogicalTensor
from engine.state.member import Captured, Member, Targets
from engine.state.objects import ObjectMember
from engine.state.pick import adapter_for, is_plain_state
from engine.state.shard import Shard

_RESERVED = ("optim", "buffers")  # the first word of tensors' names where a job has one model


class Members:
    """``model`` is the job's only model, or None; ``members`` the named ones and the objects that are no models.

    Raises :class:`LayoutError` where live state is not laid out as the adapter says, :class:`UsageError` for an object of no known kind.
    """

    def __init__(self, model: Any, members: Mapping[str, Any], rank: int) -> None:
        self.models: dict[str, Member] = {}
        self.objects: dict[str, ObjectMember] = {}
        if model is not None:
            self.models[""] = Member("", adapter_for("model", model), rank)
        for name, member in members.items():
            if name in _RESERVED:
                raise UsageError(f"a member cannot be called '{name}': tensors of the job's only model are named so")
            if is_plain_state(member):
                self.objects[name] = ObjectMember(name, member)
            else:
                self.models[name] = Member(f"{name}.", adapter_for(name, member), rank)
        for attached in self.models.values():
            attached.check()
        self._captured: dict[str, Any] = {}
        self._last: list[Captured] = []
        self._shards: list[Shard] = []
        self._stepped: frozenset[str] = frozenset()
        self._frozen: frozenset[tuple[str, tuple[int, ...]]] = frozenset()

    @property
    def engine(self) -> str:
        return ", ".join(dict.fromkeys(member.adapter.engine for member in self.models.values()))

    def model_shards(self) -> list[Shard]:
        return [shard for member in self.models.values() for shard in member.shards()]

    def capture(self) -> tuple[list[Shard], frozenset[str]]:
        """All live tensors, and the names of those that only an optimizer's step changes: the same list while every tensor lies where it
        lay. What is no tensor is captured with them, for the records."""
        models, of_objects = [member.capture() for member in self.models.values()], list[Shard]()
        for name, attached in self.objects.items():
            self._captured[name], found = attached.capture()
            of_objects += found
        if len(models) != len(self._last) or any(new is not old for new, old in zip(models, self._last, strict=True)):
            self._last, self._shards = models, [shard for captured in models for shard in captured.shards]
            self._stepped = frozenset().union(*(captured.stepped for captured in models))
            self._frozen = frozenset().union(*(captured.frozen for captured in models))
        return self._shards + of_objects if of_objects else self._shards, self._stepped

    def frozen(self) -> frozenset[tuple[str, tuple[int, ...]]]:
        """The parts of parameters that nobody trains, as captured last: a tensor's name with a part's offsets."""
        return self._frozen

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [member.adapter.optimizer for member in self.models.values() if member.adapter.optimizer is not None]

    def before_forward(self, act: Callable[[], bool]) -> None:
        """``act`` before each forward of a model, until it returns True."""
        handles: list[Any] = []

        def hook(*_: Any) -> None:
            if act():
                for handle in handles:
                    handle.remove()

        handles += [member.adapter.module.register_forward_pre_hook(hook, prepend=True) for member in self.models.values()]

    def pending(self) -> str:
        """See :meth:`engine.state.source.Adapter.pending`: of the first member that has anything."""
        return next((told for member in self.models.values() if (told := member.adapter.pending())), "")

    def aliases(self) -> dict[str, str]:
        return {alias: name for member in self.models.values() for alias, name in member.aliases().items()}

    def records(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Of the models and of the objects that all ranks share, and of this rank's own, as captured last."""
        models = {name: member.record() for name, member in self.models.items()}
        shared = {name: self._captured[name] for name, member in self.objects.items() if not member.per_rank}
        own = {name: self._captured[name] for name, member in self.objects.items() if member.per_rank}
        return models, shared, own

    def targets(self, stored: dict[str, LogicalTensor], aliases: dict[str, str], records: Mapping[str, Any]) -> Targets:
        """What of the models a checkpoint fills; ``records``: the models' by name. Changes nothing."""
        merged = Targets([], [])
        for name, member in self.models.items():
            found = member.targets(stored, aliases, records.get(name, {}))
            merged.scalars += found.scalars
            merged.tensors += found.tensors
            merged.states += found.states
            merged.stored_names.update(found.stored_names)
        return merged

    def publish(self) -> None:
        """A collective where an engine's is: every rank calls it, once a load."""
        for member in self.models.values():
            member.adapter.publish()
