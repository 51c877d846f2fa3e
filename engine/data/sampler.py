"""A sampler whose position is a number of global samples: it survives a different world size, batch size or accumulation."""

import logging
import operator
import weakref
from collections.abc import Iterator, Sized
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist

from engine.data.seeds import loader_seeds
from engine.data.walk import Walk
from engine.errors import IncompatibleCheckpoint, UsageError
from engine.options import one_of
from engine.state.progress import Progress

logger = logging.getLogger("engine")

Empty = Literal["repeat", "yield", "refuse"]

_ASKS = 3
"""At how many iterations, at most, that find no batch an epoch's end is over: a loader with workers asks twice for an iterator, and a
loop that is bounded by ``len`` draws from none."""


class _Pass:
    """The rest of one epoch, as a loader draws it: this rank's part of each global batch.

    ``samples`` is the position at which it begins, ``handed`` the one up to which it has been handed out.
    """

    def __init__(self, sampler: "ElasticSampler", walk: Walk, samples: int) -> None:
        self._sampler, self._walk = sampler, walk
        self.samples = self.handed = samples
        self._epoch, self._offset = walk.locate(samples)
        self.end = samples + walk.end(self._epoch) - self._offset
        self.is_over = False
        self._order: torch.Tensor | None = None

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> list[int]:
        loader_seeds.end()
        if self.handed >= self.end:
            self._order, self.is_over = None, True
            self._sampler.note_end()
            raise StopIteration
        sampler, size = self._sampler, min(self._walk.global_batch_size, self.end - self.handed)
        first, last = (self._offset + cut for cut in sampler.part(size))
        if first == last and sampler.empty == "repeat":
            first, last = self._offset, self._offset + 1
        if sampler.shuffle and self._order is None:
            self._order = sampler.order(self._epoch)
        self._offset += size
        self.handed += size
        sampler.note_handed(self)
        return list(range(first, last)) if self._order is None else self._order[first:last].tolist()

    def __len__(self) -> int:
        """Return the number of batches of the whole pass."""
        return -(-(self.end - self.samples) // self._walk.global_batch_size)

    def begin(self, *, empty: bool) -> None:
        """A loader is about to draw from this; with ``empty``, there is nothing to draw."""
        loader_seeds.begin(self._sampler.seed, self._epoch, self._offset, self._sampler.rank)
        if empty:
            self.end = self.handed


class ElasticSampler:
    """Batch sampler: yields this rank's part of each global batch, as lists of indices, for the rest of one epoch.

    The order of an epoch depends on ``seed`` and the epoch only; a global batch is the next ``global_batch_size`` samples of it,
    and each rank takes its contiguous part. So no sample is repeated or skipped when a resume, in mid-epoch too, changes the number
    of ranks, the batch size or ``drop_last``, and the order is that of an uninterrupted run. With ``drop_last`` false the last batch
    of an epoch may be short, and ranks' parts of it unequal. With ``drop_last`` true the samples at an epoch's end that
    do not fill a batch are left out of that epoch; a resume that finds fewer left than its own batch begins the next one.

    The position is what training has consumed, not what a loader has read. As a member of a :class:`~engine.Checkpointer` the sampler
    follows the progress that ``resume`` returns: ``progress.advance()`` after each step moves it, and every iteration begins there,
    also after a loop that was left in mid-epoch or was bounded by ``len``. Without a checkpointer, :meth:`follow` a progress, or
    :meth:`seek`; else an epoch counts as consumed once its last batch is handed out.

    Args:
        empty: what ranks get that have no part of an epoch's last batch, where that has fewer samples than there are ranks: they
            ``repeat`` its first sample, of :attr:`weight` 0, so that every rank has something to run; they ``yield`` an empty list, for
            a ``collate_fn`` that takes it; or that is refused (``refuse``), when it is first known. The default repeats, and reports it.
        rank, world_size: by default those of the process group; give those of the data-parallel group where it is smaller.

    Making an iterator of a ``DataLoader`` over it draws nothing from PyTorch's global generator, see :class:`~engine.data.seeds.LoaderSeeds`.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        empty: Empty | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        self._takes_group = world_size is None
        self.rank = rank if rank is not None else dist.get_rank() if initialised else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if initialised else 1
        self.length, self.global_batch_size = len(dataset), operator.index(global_batch_size)
        self.seed, self.shuffle, self.drop_last = operator.index(seed), bool(shuffle), bool(drop_last)
        self.empty = empty or "repeat"
        self._reports_empty = empty is None
        one_of("empty", self.empty, Empty)
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is not one of {self.world_size} ranks")
        if global_batch_size < 1 or global_batch_size % self.world_size:
            raise UsageError(f"global_batch_size {global_batch_size} is not a positive multiple of the {self.world_size} ranks")
        if self.samples_per_epoch == 0:
            raise UsageError(f"{self.length} samples do not fill one global batch of {global_batch_size}; lower it, or set drop_last=False")
        self._walk = self._fresh = Walk(self.length, self.seed, self.shuffle, self.global_batch_size, self.drop_last, 0, 0, 0)
        self._look_for_empty(self._walk, 0)
        self._loaded: Walk | None = None  # until a seek
        self._progress: Progress | None = None
        self._samples = 0  # the position, where no progress is followed
        self._sought = self._has_warned = False
        self._forget()

    @property
    def samples_per_epoch(self) -> int:
        """Of an epoch that is cut by this batch size from its start."""
        return self.length - self.length % self.global_batch_size if self.drop_last else self.length

    @property
    def samples(self) -> int:
        """The position: how many global samples are consumed since the start of training."""
        return self._progress.samples if self._progress is not None else self._samples

    def locate(self, samples: int) -> tuple[int, int]:
        """Return (completed epochs, samples into the next) after ``samples`` global samples since the start of training."""
        return self._walk.locate(samples)

    def seek(self, samples: int) -> None:
        """Go to a position: ``samples`` global samples consumed since the start of training, as the run whose state was loaded
        counted them. From there on this sampler's own batch size and ``drop_last`` hold, and no progress is followed.

        Raises :class:`UsageError` where no batch begins at that position, or some rank's part is empty and that is refused.
        """
        walk = self._loaded or self._walk
        walk.batch(samples)
        epoch, offset = walk.locate(samples)
        if (walk.global_batch_size, walk.drop_last) != (self.global_batch_size, self.drop_last):
            walk = msgspec.structs.replace(self._fresh, samples=samples, epoch=epoch, offset=offset)
        self._look_for_empty(walk, samples)
        if self._progress is not None:
            self._progress.remove_follower(self)
        self._walk, self._loaded, self._progress, self._samples = walk, None, None, samples
        self._forget()
        self._sought = True

    def restart(self, samples: int) -> None:
        """Begin the first epoch at a position that was counted without this sampler."""
        self._loaded, self._walk = None, msgspec.structs.replace(self._fresh, samples=samples)
        self.seek(samples)

    def follow(self, progress: Progress) -> None:
        """Take the position from ``progress.samples`` from now on, and serve ``progress.advance()``.

        A :class:`~engine.Checkpointer` calls this for the progress that ``resume`` returns. Right after a seek
        to an epoch's end that ``progress.epoch`` does not count yet, the first iteration is empty: the loop ends its epoch.

        Raises :class:`UsageError` where ``progress.samples`` is not a position.
        """
        self._walk.batch(progress.samples)
        epoch, offset = self._walk.locate(progress.samples)
        if self._progress is not None:
            self._progress.remove_follower(self)
        is_over = self._sought and self._handed < 0 and not offset and progress.epoch == epoch - 1
        self._forget()
        self._progress, self._start, self._step, self._is_over = progress, progress.samples, progress.step, is_over * _ASKS
        progress.add_follower(self)

    def note_saved(self, progress: Progress) -> None:
        """Check the position of a progress that is saved. One that is not followed says where training is, and none is followed
        from then on: a program that makes a new progress for each save does not advance the other.

        Raises :class:`UsageError` where ``progress.samples`` is not a position that training can have come to.
        """
        self.check(progress.samples, progress.step)
        if progress is not self._progress:
            if self._progress is not None:
                self._progress.remove_follower(self)
            self._progress, self._samples = None, progress.samples
        self._note_moved(progress)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, or stay where training is in it. Trainers call this; all ranks alike.

        Raises :class:`UsageError` for an epoch before the present one.
        """
        present, offset = self._walk.locate(self.samples)
        if epoch == present:
            return
        if epoch < present:
            if epoch == present - 1 and self._is_at_end():
                return
            raise UsageError(f"set_epoch({epoch}), but training is in epoch {present}, {offset} samples into it. To go back, call seek(samples)")
        if offset:
            logger.warning("set_epoch(%d): %d of %d samples of epoch %d are left out", epoch, self._walk.end(present) - offset, self.length, present)
        self._walk = msgspec.structs.replace(self._fresh, samples=self.samples, epoch=epoch, offset=0)
        self._forget()

    def batch(self, samples: int) -> int:
        """Return how many samples the global batch at a position has: fewer than ``global_batch_size`` for a short last one."""
        return self._walk.batch(samples)

    def part(self, size: int) -> tuple[int, int]:
        """Return where this rank's part of a global batch of ``size`` samples begins and ends."""
        return size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size

    @property
    def weight(self) -> float:
        """What this rank's mean loss over the batch at the position counts for, so that the mean over the ranks is the mean over the
        global batch: 1.0, but for a short last batch. Read it before ``progress.advance()``.

        Raises :class:`UsageError` where no progress is followed: a loader reads ahead.
        """
        if self._progress is None:
            raise UsageError("weight is that of the batch at the position: follow a progress first (a Checkpointer's resume does)")
        size = self.batch(self.samples)
        first, last = self.part(size)
        return (last - first) * self.world_size / size

    def check(self, samples: int, step: int) -> None:
        """Check a position that a progress has come to, with its step. Raises :class:`UsageError` naming what was counted wrong."""
        self._walk.batch(samples)
        if self._handed < 0:
            return
        if samples > self._handed:
            raise UsageError(
                f"progress counts {samples} samples, but the sampler has handed out {self._handed}: a step was counted twice, or with more "
                "samples than its batch has. Call progress.advance() once a step"
            )
        if samples == self._start < self._handed and step > self._step:
            raise UsageError(
                f"progress.step went from {self._step} to {step} while progress.samples stayed {samples}: a resume would repeat these "
                "samples. Call progress.advance() after each step, which counts both"
            )

    def __len__(self) -> int:
        """Return the number of batches of the iteration that is under way, or of the next one."""
        current = self._current() if self._current is not None else None
        if current is not None and (current.samples <= self.samples < current.end if self._progress is not None else not current.is_over):
            return len(current)
        return 0 if self._is_at_end() else len(_Pass(self, self._walk, self.samples))

    def __iter__(self) -> Iterator[list[int]]:
        if self._loaded and not self._sought:
            raise UsageError("the sampler's state says what positions mean, not where training was: call seek(samples) after load_state_dict()")
        if self._takes_group and dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.world_size:
            raise UsageError(
                f"this sampler was made for {self.world_size} ranks, and the process group has {dist.get_world_size()}: every rank would get "
                "the same samples. Make it after init_process_group, or give rank= and world_size="
            )
        self._loaded = None  # a StatefulDataLoader loads it again as it begins to iterate, after the seek
        if self._progress is not None:
            self._check_followed(self._progress)
        elif self._samples < self._handed:
            raise UsageError(
                f"the last iteration was left after {self._handed - self._samples} samples, and nothing says how many of them were trained on. "
                "Follow a progress (a Checkpointer's resume does) and call progress.advance() after each step, or seek() to the position"
            )
        begun = _Pass(self, self._walk, self.samples)
        begun.begin(empty=self._is_at_end())
        self._is_over = max(0, self._is_over - 1)
        if self._handed < 0:
            self._handed = self._start = begun.samples
        self._current = weakref.ref(begun)
        return begun

    def _is_at_end(self) -> bool:
        """Whether the loop is yet to end the epoch that the position is at the end of: it has not counted it."""
        if self._is_over and self._progress is not None and self._progress.epoch >= self._walk.locate(self.samples)[0]:
            self._is_over = 0
        return self._is_over > 0

    def _check_followed(self, progress: Progress) -> None:
        self.check(progress.samples, progress.step)
        end = self._walk.end(self._walk.locate(progress.samples)[0])
        if self._start == progress.samples and self._handed >= self._start + end and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "an epoch's batches are handed out again: progress.samples is still %d. If they were trained on, call progress.advance() "
                "after each step",
                progress.samples,
            )
        self._note_moved(progress)

    def _note_moved(self, progress: Progress) -> None:
        if self._start != progress.samples:
            self._start, self._step = progress.samples, progress.step

    def note_handed(self, begun: _Pass) -> None:
        """Take in that ``begun`` has handed out a batch."""
        self._handed = max(self._handed, begun.handed)
        if self._progress is None and begun.handed == begun.end:
            self._samples = begun.end

    def note_end(self) -> None:
        """Take in that a loader has found the end of an iteration: the next one has batches."""
        self._is_over = 0

    def _forget(self) -> None:
        """What was handed out before counts no more."""
        self._handed = -1  # the furthest position that is handed out
        self._start, self._step = 0, 0  # position and step as the last iteration that moved began
        # For how many iterations the epoch that ends at the position is yet to be ended by its loop.
        self._is_over = 0
        self._current: weakref.ref[_Pass] | None = None

    def _look_for_empty(self, walk: Walk, samples: int) -> None:
        """In the last batch of this epoch, which a changed batch size may have cut, and of each further one."""
        epoch, offset = walk.locate(samples)
        for left in (walk.end(epoch) - offset, walk.end(epoch + 1)):
            short = left % walk.global_batch_size
            if 0 < short < self.world_size and self.empty != "yield":
                problem = f"the last batch of an epoch has fewer samples ({short}) than there are ranks ({self.world_size})"
                if self.empty == "refuse":
                    raise UsageError(f"{problem}. Set drop_last=True, choose a different global_batch_size, or give empty='repeat' or 'yield'")
                if self.rank == 0 and self._reports_empty:
                    logger.warning("%s: ranks without one run its first sample again. Multiply the loss by sampler.weight, which is 0 there", problem)
                return

    def order(self, epoch: int) -> torch.Tensor:
        """Return the order of an epoch's samples, [length] int64."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.length, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """What gives a position its meaning: the same on all ranks, and between two seeks. The position is ``progress.samples``."""
        return msgspec.structs.asdict(self._walk)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what positions mean; :meth:`seek` must follow."""
        self.check_state_dict(state)
        self._loaded = msgspec.convert(state, Walk)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`IncompatibleCheckpoint` if this sampler would give other samples than the saved one. A checkpointer calls
        this before it changes anything."""
        try:
            stored = msgspec.convert(state, Walk)
        except msgspec.ValidationError as e:
            raise IncompatibleCheckpoint(f"the sampler's state is not as this version writes it: {e}") from e
        pairs = [(name, getattr(self, name), getattr(stored, name)) for name in ("length", "seed", "shuffle")]
        differing = [f"{name} is {mine!r} here, {its!r} in the checkpoint" for name, mine, its in pairs if mine != its]
        if differing:
            raise IncompatibleCheckpoint(f"the data order differs from the saved run's: {'; '.join(differing)}. Samples would be repeated or skipped")
