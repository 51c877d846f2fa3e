"""Proof that live tensors are what a checkpoint holds: by digests of what was filled, or all read again and compared."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import xxhash

from engine import dcp
from engine.format.layout import REPLICATED, Grid, LogicalTensor, Mesh, Part
from engine.state.boxes import Box
from engine.state.shard import Shard, bytes_of, torch_dtype
from engine.transfer.stored import StoredCheckpoint

Verify = Literal["sample", "all", "off"]
"""How a resume proves its tensors: by digests of a sample of what was filled, by reading all of it again, or not at all."""

SAMPLE_BYTES, SAMPLE_TENSORS = 64 * 1024 * 1024, 1024
"""What a rank digests at most with ``sample``. Which tensors, and which rows of a large one, differs by checkpoint and rank."""

_BATCH_BYTES = 64 * 1024 * 1024
_ALONE = Grid(Mesh((1,)), (REPLICATED,))

_Compared = tuple[str, torch.Tensor, LogicalTensor, Box]
"""A live name, the live values, the stored tensor, and which box of it they are."""


class Sample:
    """Digests of what has just been filled from verified bytes, to be compared with what is live when all is restored."""

    def __init__(self, shards: Sequence[Shard], seed: bytes, rank: int) -> None:
        chance = random.Random(seed + rank.to_bytes(8, "little"))
        self._rank, self._taken = rank, list[tuple[str, Box, bytes]]()
        budget = SAMPLE_BYTES
        for number in chance.sample(range(len(shards)), min(len(shards), SAMPLE_TENSORS)):
            for box, view in shards[number].held(rank):
                rows = box.sizes[0] if box.sizes else 1
                limit = min(rows, max(1, SAMPLE_BYTES // 16 // max(1, _row_bytes(box, view))))
                inner, part = _window(box, view, chance.randrange(max(1, rows - limit + 1)), limit)
                self._taken.append((shards[number].name, inner, _digest(part)))
                budget -= part.nbytes
            if budget <= 0:
                break

    def changed(self, live: Mapping[str, Shard]) -> list[str]:
        """Return the names of which this rank does not hold the same values any more."""
        return list(dict.fromkeys(name for name, box, digest in self._taken if not self._is_same(live.get(name), box, digest)))

    def _is_same(self, shard: Shard | None, box: Box, digest: bytes) -> bool:
        for held, view in shard.held(self._rank) if shard is not None else ():
            if held.offsets[1:] == box.offsets[1:] and held.sizes[1:] == box.sizes[1:]:
                first = box.offsets[0] - held.offsets[0] if box.offsets else 0
                if first >= 0 and (not box.sizes or first + box.sizes[0] <= held.sizes[0]):
                    return _digest(view.narrow(0, first, box.sizes[0]) if box.sizes else view) == digest
        return False


def _digest(view: torch.Tensor) -> bytes:
    values = view.detach().cpu().contiguous()
    return xxhash.xxh3_128_digest(bytes_of(values.view(-1).view(torch.uint8))) if values.numel() else b""


def unequal(stored: StoredCheckpoint, pairs: Sequence[tuple[Shard, LogicalTensor]], rank: int) -> list[str]:
    """Return the live names of tensors of which this rank's part is not what the checkpoint holds, all of it read again.

    No communication. A tensor that was converted is compared with the converted values.
    """
    found: dict[str, None] = {}
    batch: list[_Compared] = []
    size_bytes = 0
    for shard, theirs in pairs:
        for box, view in shard.held(rank):
            limit = max(1, _BATCH_BYTES // max(1, _row_bytes(box, view)))
            for first in range(0, max(1, box.sizes[0] if box.sizes else 1), limit):
                inner, part = _window(box, view, first, limit)
                batch.append((shard.name, part, theirs, inner))
                size_bytes += part.nbytes
                if size_bytes >= _BATCH_BYTES:
                    found.update(dict.fromkeys(_differing(stored, batch)))
                    batch, size_bytes = [], 0
    found.update(dict.fromkeys(_differing(stored, batch)))
    return list(found)


def _row_bytes(box: Box, view: torch.Tensor) -> int:
    return math.prod(box.sizes[1:]) * view.element_size()


def _window(box: Box, view: torch.Tensor, first: int, limit: int) -> tuple[Box, torch.Tensor]:
    """At most ``limit`` rows of a box and its values, from its row ``first`` on."""
    if not box.sizes or limit >= box.sizes[0]:
        return box, view
    count = min(limit, box.sizes[0] - first)
    return Box((box.offsets[0] + first, *box.offsets[1:]), (count, *box.sizes[1:])), view.narrow(0, first, count)


def _differing(stored: StoredCheckpoint, windows: Sequence[_Compared]) -> Iterator[str]:
    pairings, read = [], []
    for _, _, theirs, box in windows:
        values = torch.zeros(box.sizes, dtype=torch_dtype(theirs.dtype), device="cpu")
        part = Part(_ALONE, box.offsets, box.sizes)
        pairings.append(dcp.Pairing(Shard(LogicalTensor(theirs.name, theirs.dtype, theirs.shape, (part,)), (values,)), theirs))
        read.append(values)
    if pairings:
        dcp.load(pairings, stored, 0)
    for (name, view, _, _), values in zip(windows, read, strict=True):
        if not _same_bits(view, values):
            yield name


def _same_bits(live: torch.Tensor, stored: torch.Tensor) -> bool:
    live = live.detach().cpu().contiguous()
    stored = stored.to(live.dtype)
    if live.numel() == 0:
        return True
    return torch.equal(live.view(-1).view(torch.uint8), stored.contiguous().view(-1).view(torch.uint8))
