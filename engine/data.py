"""A sampler whose position is a number of global samples: it survives another world size, batch size or accumulation."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import IncompatibleCheckpoint, UsageError


class ElasticSampler:
    """Batch sampler: yields this rank's part of each global batch, as lists of indices, for the rest of one epoch.

    The order of an epoch depends on ``seed`` and the epoch only; a global batch is the next ``global_batch_size`` samples of it,
    and each rank takes its contiguous part. So no sample is repeated or skipped when the number of ranks changes, and the order
    is that of an uninterrupted run. With ``drop_last`` false the last batch of an epoch may be short, and ranks' parts of it
    unequal (even empty). With ``drop_last`` true those samples are left out of that epoch, whose length then depends on
    ``global_batch_size``: it must stay the same over a resume, while the number of ranks may change.

    As a member of a :class:`~engine.Checkpointer` it is placed by ``progress.samples`` on resume; by hand, use :meth:`seek`.
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
        self.length, self.global_batch_size = len(dataset), global_batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        if global_batch_size < 1 or global_batch_size % self.world_size:
            raise UsageError(f"global_batch_size {global_batch_size} is not a positive multiple of the {self.world_size} ranks")
        if self.samples_per_epoch == 0:
            raise UsageError(f"{self.length} samples do not fill one global batch of {global_batch_size}; lower it, or set drop_last=False")
        self._samples = 0

    @property
    def samples_per_epoch(self) -> int:
        return self.length - self.length % self.global_batch_size if self.drop_last else self.length

    def seek(self, samples: int) -> None:
        """Go to a position: ``samples`` global samples consumed since the start of training."""
        self._samples = samples

    def __len__(self) -> int:
        """Batches left in the current epoch."""
        left = self.samples_per_epoch - self._samples % self.samples_per_epoch
        return -(-left // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = divmod(self._samples, self.samples_per_epoch)
        order = self._order(epoch)
        while done < self.samples_per_epoch:
            batch = order[done : min(done + self.global_batch_size, self.samples_per_epoch)]
            first, last = (len(batch) * r // self.world_size for r in (self.rank, self.rank + 1))
            yield batch[first:last]
            done += len(batch)
        self._samples = (epoch + 1) * self.samples_per_epoch  # loaders read ahead: only a whole epoch is counted here

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.length, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same. The position itself is ``progress.samples``."""
        return {"length": self.length, "seed": self.seed, "shuffle": self.shuffle, "samples_per_epoch": self.samples_per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to take over; see :meth:`check_state_dict`."""
        self.check_state_dict(state)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`IncompatibleCheckpoint` if this sampler would give other samples than the saved one. A checkpointer calls
        this before it changes anything."""
        mine = self.state_dict()
        differing = [f"{key} is {mine[key]!r} here, {state.get(key)!r} in the checkpoint" for key in mine if mine[key] != state.get(key)]
        if differing:
            raise IncompatibleCheckpoint(f"the data order differs from the saved run's: {'; '.join(differing)}. Samples would be repeated or skipped")
