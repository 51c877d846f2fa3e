"""All members of one checkpointer: models and other objects, as the shards, targets and records of the two pipelines."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from engine.errors import UsageError
from engine.format.layout import LogicalTensor, Part
from engine.state.carried import meshes_of, of_rank
from engine.state.member import Captured, Member, Targets
from engine.state.objects import ObjectMember
from engine.state.pick import adapter_for, is_plain_state
from engine.state.progress import Progress
from engine.state.shard import Shard

_RESERVED = ("optim", "buffers", "extra")  # the first word of tensors' names where a job has one model


class Members:
    """``model`` is the job's only model, or None; ``members`` the named ones and the objects that are no models.

    Raises :class:`LayoutError` where live state is not laid out as the adapter says, :class:`UsageError` for an object of no known kind.
    """

    def __init__(self, model: Any, members: Mapping[str, Any], rank: int) -> None:
        self.models: dict[str, Member] = {}
        self.objects: dict[str, ObjectMember] = {}
        if model is not None:
            self.models[""] = Member("", adapter_for("model", model), rank)
        for name, member in sorted(members.items()):  # ranks may name them in different order
            if name in _RESERVED:
                raise UsageError(f"a member cannot be called '{name}': tensors of the job's only model are named so")
            if is_plain_state(member):
                self.objects[name] = ObjectMember(name, member, rank)
            else:
                self.models[name] = Member(f"{name}.", adapter_for(name, member), rank)
        for attached in self.models.values():
            attached.check()
        self._captured: dict[str, Any] = {}
        self._of_objects: list[Shard] = []
        self._own: dict[str, Shard] = {}
        self._last: list[Captured] = []
        self._shards: list[Shard] = []
        self._stepped: frozenset[str] = frozenset()
        self._frozen: frozenset[tuple[str, tuple[int, ...]]] = frozenset()

    @property
    def names(self) -> list[str]:
        """Each member's name and kind; the job's only model has none."""
        kinds = {name: type(member.target) for name, member in self.objects.items()} | {name: type(m.adapter) for name, m in self.models.items()}
        return [f"{name or 'the model'}: {kind.__name__}" for name, kind in sorted(kinds.items())]

    @property
    def engine(self) -> str:
        return ", ".join(dict.fromkeys(member.adapter.engine for member in self.models.values()))

    def model_shards(self) -> list[Shard]:
        return [shard for member in self.models.values() for shard in member.shards()]

    @property
    def has_per_rank(self) -> bool:
        return any(member.per_rank for member in self.objects.values())

    def capture_objects(self) -> list[list[Any]]:
        """Capture the members that are not models, before :meth:`capture`. Returns what describes this rank's own tensors, for
        :meth:`describe_per_rank`."""
        self._of_objects, self._own = [], dict[str, Shard]()
        for name, attached in self.objects.items():
            self._captured[name], found = attached.capture()
            if attached.per_rank:
                self._own.update((shard.name, shard) for shard in found)
            else:
                self._of_objects += found
        return [[shard.name, shard.tensor.dtype, list(shard.tensor.shape)] for shard in self._own.values()]

    def describe_per_rank(self, described: Sequence[list[list[Any]]]) -> None:
        """Take in what :meth:`capture_objects` returned on each rank: all ranks describe all tensors alike."""
        for rank, tensors in enumerate(described):
            for name, dtype, shape in tensors:
                tensor = LogicalTensor(name, dtype, tuple(shape), (Part(of_rank(rank)),))
                self._of_objects.append(self._own.get(name) or Shard(tensor, (None,)))

    def capture(self) -> tuple[list[Shard], frozenset[str]]:
        """All live tensors, and the names of those that only an optimizer's step changes: the same list while every tensor lies where it
        lay. What is not a tensor is captured with them, for the records. :meth:`capture_objects` comes first."""
        models = [member.capture() for member in self.models.values()]
        more = [shard for captured in models for shard in captured.more] + self._of_objects
        if len(models) != len(self._last) or any(new is not old for new, old in zip(models, self._last, strict=True)):
            self._last, self._shards = models, [shard for captured in models for shard in captured.shards]
            self._stepped = frozenset().union(*(captured.stepped for captured in models))
            self._frozen = frozenset().union(*(captured.frozen for captured in models))
        return self._shards + more if more else self._shards, self._stepped

    def frozen(self) -> frozenset[tuple[str, tuple[int, ...]]]:
        """The parts of parameters that nobody trains, as captured last: a tensor's name with a part's offsets."""
        return self._frozen

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return those whose steps can be watched."""
        return [part.optimizer for member in self.models.values() for part in member.adapter.parts if part.has_hooks]

    def watch_first_steps(self) -> None:
        """Capture after each optimizer's first step: state that cannot be saved is refused as soon as it exists. A fresh optimizer has
        none before."""
        for member in self.models.values():
            for part in member.adapter.parts:
                if part.has_hooks and not any(part.optimizer.state.values()):
                    _after_first_step(part.optimizer, member)

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

    def follow(self, progress: Progress, restored: Collection[str] = ()) -> None:
        """Let samplers follow a progress that training goes on from; those that are not ``restored`` begin there."""
        for name, member in self.objects.items():
            if hasattr(member.target, "follow"):
                if name not in restored:
                    member.target.restart(progress.samples)
                member.target.follow(progress)

    def note_saved(self, progress: Progress) -> None:
        """Let samplers check the position that is saved."""
        for member in self.objects.values():
            if hasattr(member.target, "note_saved"):
                member.target.note_saved(progress)

    def report_unlisted(self) -> None:
        for member in self.models.values():
            member.report_unlisted()

    def extra(self) -> dict[str, Any]:
        """Return this rank's extra state of modules, by model, as captured last."""
        return {name: extra for name, member in self.models.items() if (extra := member.extra())}

    def captured_object(self, name: str) -> Any:
        """Return the plain state of a member that is not a model, as captured last."""
        return self._captured[name]

    def meshes(self) -> list[Any]:
        return meshes_of(p for member in self.models.values() for p in member.adapter.names.parameters.values())

    def device(self) -> torch.device | None:
        """Return where the models' parameters lie."""
        return next((p.device for member in self.models.values() for p in member.adapter.names.parameters.values()), None)

    def targets(
        self,
        stored: dict[str, LogicalTensor],
        aliases: dict[str, str],
        records: Mapping[str, Any],
        extra: Mapping[str, Any],
        may_resize: Callable[[str], bool],
    ) -> Targets:
        """What of the models a checkpoint fills; ``records`` and ``extra``: the models' by name. Changes nothing."""
        merged = Targets([], [])
        for name, member in self.models.items():
            found = member.targets(stored, aliases, records.get(name, {}), extra.get(name, {}), may_resize)
            merged.scalars += found.scalars
            merged.tensors += found.tensors
            merged.states += found.states
            merged.early.update(found.early)
            merged.empty += found.empty
            merged.stored_names.update(found.stored_names)
        return merged

    def publish(self) -> None:
        """A collective where an engine's is: every rank calls it, once a load."""
        for member in self.models.values():
            member.adapter.publish()


def _after_first_step(optimizer: torch.optim.Optimizer, member: Member) -> None:
    """The hook stays: hooks cannot be removed while they run."""
    seen = False

    def check(*_: Any) -> None:
        nonlocal seen
        if not seen and any(optimizer.state.values()):
            seen = True
            member.check_state()

    optimizer.register_step_post_hook(check)
