"""Ranks that hold the same tensor are seen to hold the same bytes: a drift (gradients that were never reduced, a bad device) is named.

Each rank digests what it shares with others, one digest for each group of holders; where two differ, a second look names the tensors.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import xxhash
from msgspec import Struct

from engine.errors import PeerError
from engine.format.layout import ANY, REPLICATED, Grid, Layout, LogicalTensor
from engine.state.boxes import unravel
from engine.state.shard import Shard, bytes_of

Replicas = Literal["all", "sample", "off"]
SAMPLE_BYTES, SAMPLE_TENSORS = 64 * 1024 * 1024, 1024
"""What a rank digests at most of its replicated tensors at one save, with ``sample``; each save goes on where the last one ended."""


def shares(tensors: Sequence[LogicalTensor]) -> list[int]:
    """The places of the tensors that several ranks hold. Those whose writer is fixed (buffers, one rank's by declaration) may differ."""
    return [i for i, tensor in enumerate(tensors) if any(_is_shared(part.layout) for part in tensor.parts)]


def _is_shared(layout: object) -> bool:
    if not isinstance(layout, Grid) or layout.writer != ANY:
        return False
    return any(dim == REPLICATED and extent > 1 for dim, extent in zip(layout.dims, layout.mesh.shape, strict=True))


def turns(tensors: Sequence[LogicalTensor], places: Sequence[int]) -> list[list[int]]:
    """``places`` in samples, one a save. By global sizes, so that all ranks choose alike. At least one, which may be empty."""
    found: list[list[int]] = [[]]
    total = 0
    for place in places:
        size_bytes = tensors[place].size_bytes
        if total and (total + size_bytes > SAMPLE_BYTES or len(found[-1]) == SAMPLE_TENSORS):
            found.append([])
            total = 0
        found[-1].append(place)
        total += size_bytes
    return found


class Digests(Struct):
    """What one rank shares with others: by group of holders, one digest of all, and one of each tensor."""

    groups: dict[str, bytes] = {}
    tensors: dict[str, list[tuple[str, bytes]]] = {}

    def of(self, groups: Sequence[str]) -> dict[str, list[tuple[str, bytes]]]:
        """Tensor by tensor, of the groups in question."""
        return {group: found for group, found in self.tensors.items() if group in groups}


def digests(shards: Sequence[Shard], places: Sequence[int], rank: int) -> Digests:
    tensors: dict[str, list[tuple[str, bytes]]] = {}
    for group, name, data in _shared(shards, places, rank):
        tensors.setdefault(group, []).append((name, xxhash.xxh3_128_digest(data)))
    return Digests({group: xxhash.xxh3_128_digest(b"".join(found for _, found in entries)) for group, entries in tensors.items()}, tensors)


def drifted(reports: Sequence[dict[str, bytes]]) -> list[str]:
    """The groups whose holders' digests differ."""
    first: dict[str, bytes] = {}
    return sorted({group for report in reports for group, found in report.items() if first.setdefault(group, found) != found})


def name_the_drift(reports: Sequence[dict[str, list[list[object]]]]) -> None:
    """Raises :class:`PeerError` with tensors and ranks. ``reports``: every rank's :meth:`Digests.of`."""
    odd: dict[str, list[int]] = {}
    first: dict[str, tuple[int, dict[object, object]]] = {}
    for rank, report in enumerate(reports):
        for group, entries in report.items():
            reference, values = first.setdefault(group, (rank, {name: value for name, value in entries}))
            for name, value in entries:
                if values.get(name) != value:
                    odd.setdefault(f"{name} (as rank {reference} has it)", []).append(rank)
    listed = [f"{name}: another value on ranks {ranks[:16]}" for name, ranks in odd.items()]
    more = f"\n    … and {len(listed) - 8} more tensors" if len(listed) > 8 else ""
    raise PeerError(
        f"replicas have drifted apart: {len(odd)} tensors that ranks should hold alike differ:\n    " + "\n    ".join(listed[:8]) + more + "\n"
        "  Usual causes: gradients are not reduced (the loss is computed past the DDP wrapper), ranks started from other weights, or faulty "
        "memory. Nothing was saved; replicas='off' saves one rank's values"
    )


def _shared(shards: Sequence[Shard], places: Sequence[int], rank: int) -> Iterator[tuple[str, str, Any]]:
    """(group, tensor, bytes) of what this rank shares. A group: the ranks of one mesh that hold the same piece."""
    for i in places:
        shard = shards[i]
        for part, local in zip(shard.tensor.parts, shard.locals, strict=True):
            layout = part.layout
            if local is not None and (group := _group(layout, rank)):
                yield group, shard.name, _bytes(local)


@lru_cache(1024)
def _group(layout: Layout, rank: int) -> str:
    """Empty where the rank shares nothing of it."""
    if not _is_shared(layout):
        return ""
    assert isinstance(layout, Grid)
    position = layout.mesh.position_of(rank)
    if position is None:
        return ""
    index = unravel(position, layout.mesh.shape)
    cell = [at if dim != REPLICATED else -1 for at, dim in zip(index, layout.dims, strict=True)]
    return f"{layout.mesh}{layout.dims}{cell}"


def _bytes(local: torch.Tensor) -> Any:
    if local.dtype is torch.float32 and local.device.type == "cpu" and local.is_contiguous():  # a thousand small ones a save
        return local.detach().numpy()
    return bytes_of(local.detach().cpu().contiguous().view(-1).view(torch.uint8)) if local.numel() else memoryview(b"")
