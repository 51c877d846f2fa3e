"""What positions mean: where every sample of a run lies. Pure arithmetic."""

from typing import Annotated

import msgspec

from engine.errors import UsageError

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Size = Annotated[int, msgspec.Meta(ge=1)]


class Walk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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

    def batch(self, samples: int) -> int:
        """Return how many samples the global batch at a position has.

        Raises :class:`UsageError` where no batch begins there.
        """
        epoch, offset = self.locate(samples)
        start = self.offset if epoch == self.epoch else 0
        if beyond := (offset - start) % self.global_batch_size:
            at, size = samples - beyond, min(self.global_batch_size, self.end(epoch) - offset + beyond)
            raise UsageError(
                f"{samples} samples are not a position in the data: batches end after {at} and {at + size} samples (global_batch_size "
                f"{self.global_batch_size}, epochs of {self.end(epoch)}). Call progress.advance() after each step: it counts a short last batch too"
            )
        return min(self.global_batch_size, self.end(epoch) - offset)
