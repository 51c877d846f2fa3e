"""Ranks that hold the same tensor are seen to hold the same bytes: a drift (gradients that were never reduced, a bad device) is named.

Each rank digests what it shares with others, one digest for each group of holders; where two differ, a second look names the tensors.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import torch
import xxhash
from msgspec import Struct

from engine.errors import PeerError
from engine.format.layout import ANY, REPLICATED, Grid, Layout, LogicalTensor, Part
from engine.state.boxes import unravel
from engine.state.shard import Shard, bytes_of

Replicas = Literal["all", "sample", "off"]
SAMPLE_BYTES, SAMPLE_TENSORS = 64 * 1024 * 1024, 1024
"""What a rank digests at most of its replicated tensors at one save, with ``sample``; each save goes on where the last one ended."""
_SMALL_BYTES = 4096
"""Tensors up to this size are digested together: to look at one costs more than to copy it."""


def shares(tensors: Sequence[LogicalTensor]) -> list[int]:
    """The places of the tensors that several ranks hold. Those whose writer is fixed (buffers, one rank's by declaration) may differ."""
    known: dict[tuple[Part, ...], bool] = {}  # most tensors share a few layouts
    found = []
    for i, tensor in enumerate(tensors):
        is_shared = known.get(tensor.parts)
        if is_shared is None:
            is_shared = known[tensor.parts] = any(_is_shared(part.layout) for part in tensor.parts)
        if is_shared:
            found.append(i)
    return found


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
    """What one rank shares with others: one digest of all, by group of holders. ``tensors`` are those of each tensor, as (name, digest);
    ``copies`` stand for small ones, which are only digested one by one where a group differs: (names, sizes in bytes, their bytes)."""

    groups: dict[str, bytes] = {}
    tensors: dict[str, list[tuple[str, bytes]]] = {}
    copies: dict[str, tuple[list[str], list[int], torch.Tensor]] = {}

    def of(self, groups: Sequence[str]) -> dict[str, list[tuple[str, bytes]]]:
        """Tensor by tensor, of the groups in question."""
        found = {group: list(self.tensors.get(group, ())) for group in groups if group in self.groups}
        for group in found.keys() & self.copies.keys():
            names, sizes, data = self.copies[group]
            found[group] += [(name, xxhash.xxh3_128_digest(bytes_of(part))) for name, part in zip(names, data.split(sizes), strict=True)]
        return found


class Comparison:
    """What this rank compares with others at its saves. What is looked at is found once, while the tensors lie where they lay."""

    def __init__(self, kind: Replicas, rank: int) -> None:
        self._kind, self._rank = kind, rank
        self._known: tuple[Sequence[Shard], dict[int, _Shared]] = ((), {})

    def digests(self, shards: Sequence[Shard], shared: Sequence[int], turns: Sequence[Sequence[int]], count: int) -> Digests:
        """For save number ``count``; ``shared`` and ``turns``: see :func:`shares`, :func:`turns`. The same list of shards: nothing has moved."""
        if self._kind == "off":
            return Digests()
        parts = [shared] if self._kind == "all" else turns
        return self._look(shards, parts, count % len(parts)).digests()

    def prepare(self, shards: Sequence[Shard], shared: Sequence[int], turns: Sequence[Sequence[int]]) -> None:
        """All that :meth:`digests` of these would do once."""
        if self._kind != "off":
            parts = [shared] if self._kind == "all" else turns
            for number in range(len(parts)):
                self._look(shards, parts, number)

    def _look(self, shards: Sequence[Shard], parts: Sequence[Sequence[int]], number: int) -> "_Shared":
        if shards is not self._known[0]:
            self._known = (shards, {})
        known = self._known[1]
        if number not in known:
            known[number] = _Shared(shards, parts[number], self._rank)
        return known[number]


class _Shared:
    """What this rank shares of ``places``, by group."""

    def __init__(self, shards: Sequence[Shard], places: Sequence[int], rank: int) -> None:
        self._large: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._small: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for group, name, local in _shared(shards, places, rank):
            if local.device.type == "cpu" and local.is_contiguous() and local.nbytes <= _SMALL_BYTES:
                self._small.setdefault(group, []).append((name, local.view(-1).view(torch.uint8)))
            else:
                self._large.setdefault(group, []).append((name, local))
        self._views = {group: [view for _, view in entries] for group, entries in self._small.items()}

    def digests(self) -> Digests:
        found = Digests({}, {}, {})
        parts: dict[str, list[bytes]] = {}
        for group, views in self._views.items():
            data = torch.cat(views)
            found.copies[group] = [name for name, _ in self._small[group]], [view.numel() for view in views], data
            parts[group] = [xxhash.xxh3_128_digest(bytes_of(data))]
        for group, entries in self._large.items():
            found.tensors[group] = [(name, xxhash.xxh3_128_digest(_bytes(local))) for name, local in entries]
            parts.setdefault(group, []).extend(digest for _, digest in found.tensors[group])
        found.groups = {group: xxhash.xxh3_128_digest(b"".join(digests)) for group, digests in parts.items()}
        return found


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


def _shared(shards: Sequence[Shard], places: Sequence[int], rank: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(group, tensor, live values) of what this rank shares. A group: the ranks of one mesh that hold the same piece."""
    for i in places:
        shard = shards[i]
        for part, local in zip(shard.tensor.parts, shard.locals, strict=True):
            if local is not None and (group := _group(part.layout, rank)):
                yield group, shard.name, local.detach()


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


def _bytes(local: torch.Tensor) -> memoryview:
    return bytes_of(local.cpu().contiguous().view(-1).view(torch.uint8)) if local.numel() else memoryview(b"")
