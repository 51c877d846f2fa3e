"""A sampler whose position is a number of global samples: it survives another world size, batch size or accumulation."""

import operator
from collections.abc import Iterator, Sized
from typing import Annotated, Any

import msgspec
import torch
import torch.distributed as dist

from engine.errors import IncompatibleCheckpoint, UsageError

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=1)]


class _Walk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where every sample of a run lies: the order's identity, and an origin from which one batch size cuts the epochs.

    At the origin ``samples`` samples of the run are consumed, and ``offset`` is where ``epoch`` goes on.
    """

    length: _Size
    seed: int
    shuffle: bool
    global_batch_size: _Size
    drop_last: bool
    samples: _Count
    epoch: _Count
    offset: _Count

    def __post_init__(self) -> None:
        if self.offset > self.length or (self.drop_last and self.global_batch_size > self.length):
            raise ValueError(f"offset {self.offset} or global_batch_size {self.global_batch_size} is beyond the {self.length} samples")

    def end(self, epoch: int) -> int:
        """The offset at which an epoch ends: with ``drop_last``, where the last full batch since its start or the origin does."""
        start = self.offset if epoch == self.epoch else 0
        return self.length - (self.length - start) % self.global_batch_size if self.drop_last else self.length

    def locate(self, samples: int) -> tuple[int, int]:
        """(epoch, offset) of the sample that follows ``samples`` others. An epoch's end is the start of the next."""
        if samples < self.samples:
            raise UsageError(f"{samples} samples lie before {self.samples}, where the batch size last changed; load the state saved with them first")
        beyond = self.offset + samples - self.samples - self.end(self.epoch)
        if beyond < 0:
            return self.epoch, self.end(self.epoch) + beyond
        epochs, offset = divmod(beyond, self.end(self.epoch + 1))
        return self.epoch + 1 + epochs, offset


class ElasticSampler:
    """Batch sampler: yields this rank's part of each global batch, as lists of indices, for the rest of one epoch.

    The order of an epoch depends on ``seed`` and the epoch only; a global batch is the next ``global_batch_size`` samples of it,
    and each rank takes its contiguous part. So no sample is repeated or skipped when a resume, in mid-epoch too, changes the number
    of ranks, the batch size or ``drop_last``, and the order is that of an uninterrupted run. With ``drop_last`` false the last batch
    of an epoch may be short, and ranks' parts of it unequal (even empty). With ``drop_last`` true the samples at an epoch's end that
    do not fill a batch are left out of that epoch; a resume that finds fewer left than its own batch begins the next one.

    As a member of a :class:`~engine.Checkpointer` it is placed by ``progress.samples`` on resume; by hand, use
    :meth:`load_state_dict` and then :meth:`seek`.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if initialised else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if initialised else 1
        self.length, self.global_batch_size = len(dataset), operator.index(global_batch_size)
        self.seed, self.shuffle, self.drop_last = operator.index(seed), bool(shuffle), bool(drop_last)
        if global_batch_size < 1 or global_batch_size % self.world_size:
            raise UsageError(f"global_batch_size {global_batch_size} is not a positive multiple of the {self.world_size} ranks")
        if self.samples_per_epoch == 0:
            raise UsageError(f"{self.length} samples do not fill one global batch of {global_batch_size}; lower it, or set drop_last=False")
        self._walk = self._fresh = _Walk(self.length, self.seed, self.shuffle, self.global_batch_size, self.drop_last, 0, 0, 0)
        self._loaded: _Walk | None = None  # until a seek
        self._epoch, self._offset, self._sought = 0, 0, False

    @property
    def samples_per_epoch(self) -> int:
        """Of an epoch that is cut by this batch size from its start."""
        return self.length - self.length % self.global_batch_size if self.drop_last else self.length

    def locate(self, samples: int) -> tuple[int, int]:
        """(completed epochs, samples into the next) after ``samples`` global samples since the start of training. Unlike counting
        ends of loops, it is right after a resume that begins the next epoch, and while a loader reads ahead."""
        return self._walk.locate(samples)

    def seek(self, samples: int) -> None:
        """Go to a position: ``samples`` global samples consumed since the start of training, as the run whose state was loaded
        counted them. From there on this sampler's own batch size and ``drop_last`` hold."""
        walk = self._loaded or self._walk
        epoch, offset = walk.locate(samples)
        if (walk.global_batch_size, walk.drop_last) != (self.global_batch_size, self.drop_last):
            walk = msgspec.structs.replace(self._fresh, samples=samples, epoch=epoch, offset=offset)
        self._epoch, self._offset = walk.locate(samples)
        self._walk, self._loaded, self._sought = walk, None, True

    def __len__(self) -> int:
        """Batches left in the current epoch."""
        return -(-(self._walk.end(self._epoch) - self._offset) // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self._loaded and not self._sought:
            raise UsageError("the sampler's state says what positions mean, not where training was: call seek(samples) after load_state_dict()")
        self._loaded = None  # a StatefulDataLoader loads it again as it begins to iterate, after the seek
        epoch, done, end = self._epoch, self._offset, self._walk.end(self._epoch)
        order = self._order(epoch)
        while done < end:
            batch = order[done : min(done + self.global_batch_size, end)]
            first, last = (len(batch) * r // self.world_size for r in (self.rank, self.rank + 1))
            yield batch[first:last]
            done += len(batch)
        self._epoch, self._offset = epoch + 1, 0  # loaders read ahead: only a whole epoch is counted here

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.length, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What gives a position its meaning: the same on all ranks, and between two seeks. The position is ``progress.samples``."""
        return msgspec.structs.asdict(self._walk)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what positions mean; :meth:`seek` must follow."""
        self.check_state_dict(state)
        self._loaded = msgspec.convert(state, _Walk)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`IncompatibleCheckpoint` if this sampler would give other samples than the saved one. A checkpointer calls
        this before it changes anything."""
        try:
            stored = msgspec.convert(state, _Walk)
        except msgspec.ValidationError as e:
            raise IncompatibleCheckpoint(f"the sampler's state is not as this version writes it: {e}") from e
        pairs = [(name, getattr(self, name), getattr(stored, name)) for name in ("length", "seed", "shuffle")]
        differing = [f"{name} is {mine!r} here, {its!r} in the checkpoint" for name, mine, its in pairs if mine != its]
        if differing:
            raise IncompatibleCheckpoint(f"the data order differs from the saved run's: {'; '.join(differing)}. Samples would be repeated or skipped")
