"""``engine diff``: how two steps differ, however each is sharded. Memory stays bounded: values are compared a window at a time."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from engine.cli.changes import changes
from engine.cli.target import locate
from engine.cli.text import say, table
from engine.errors import CheckpointCorrupt
from engine.format.checksum import DIGEST_BYTES, block_count
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent, LogicalTensor
from engine.format.manifest import Chunk
from engine.format.record import decode_record
from engine.state.boxes import Box, boxes_at, flat_to_boxes, part_box, positions, shift
from engine.state.places import Places
from engine.transfer.stored import REMEDY, StoredCheckpoint
from engine.transfer.values import WINDOW_ELEMENTS, fill_value, gap, read_blocks, read_box

_RUN_BLOCKS = 16
_SHOWN = 20


class Gap:
    """Of one tensor: how many elements differ, the largest difference (None: not known), and whether any were read."""

    def __init__(self) -> None:
        self.elements, self.largest, self.was_read = 0, 0.0, False

    def add(self, elements: int, largest: float | int | None) -> None:
        self.elements += elements
        self.largest = None if largest is None or self.largest is None else max(self.largest, largest)


def diff(a: str, b: str, read_all: bool) -> int:
    """Prints the differences; returns 1 if there are any. What ran it, and on how many ranks, is told, but is none."""
    first, second = (StoredCheckpoint(*locate(target)) for target in (a, b))
    for name, stored in (("A", first), ("B", second)):
        summary = stored.manifest.summary
        say(f"{name} = {stored.where}: step {summary.step}, {summary.engine} on {summary.world_size} ranks")
    told = [*_record_lines(first, second), *_tensor_lines(first, second)]
    compared = [name for name in first.tensors if _alike(first.tensors[name], second.tensors.get(name))]
    gaps = {name: compare(first, second, first.tensors[name], second.tensors[name], read_all) for name in compared}
    rows = [
        [name, first.tensors[name].dtype, str(found.elements), str(_numel(first.tensors[name])), _largest(found.largest)]
        for name, found in gaps.items()
        if found.elements
    ]
    say(*told)
    if rows:
        say(*table(["values differ", "dtype", ">elements", ">of", ">max |A-B|"], rows))
    unread = sum(not found.was_read for found in gaps.values())
    say(f"{len(rows)} of {len(compared)} tensors differ in value" + (f"; {unread} are equal by their checksums, unread" if unread else ""))
    return 1 if told or rows else 0


def _record_lines(a: StoredCheckpoint, b: StoredCheckpoint) -> list[str]:
    lines = changes(decode_record(a.manifest.record), decode_record(b.manifest.record))
    if a.manifest.summary.world_size == b.manifest.summary.world_size:
        ranks = [rank for rank in range(a.manifest.summary.world_size) if a.index(rank).record() != b.index(rank).record()]
        if ranks:
            lines.append(f"random state and other state of the ranks' own: differs on ranks {_some(ranks)}")
    if a.manifest.aliases != b.manifest.aliases:
        lines.append("tied tensors: differ")
    return lines


def _tensor_lines(a: StoredCheckpoint, b: StoredCheckpoint) -> list[str]:
    lines = []
    for side, names in (("A", a.tensors.keys() - b.tensors.keys()), ("B", b.tensors.keys() - a.tensors.keys())):
        if names:
            lines.append(f"only in {side}: {_some(sorted(names))}")
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        x, y = a.tensors[name], b.tensors[name]
        if not _alike(x, y):
            lines.append(f"{name}: {x.dtype} {list(x.shape)} → {y.dtype} {list(y.shape)}")
    return lines


def _some(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _alike(x: LogicalTensor, y: LogicalTensor | None) -> bool:
    return y is not None and (x.dtype, x.shape) == (y.dtype, y.shape)


def _numel(tensor: LogicalTensor) -> int:
    return tensor.size_bytes // ITEM_BYTES[tensor.dtype]


def _largest(value: float | int | None) -> str:
    return "bytes differ" if value is None else f"{value:.6g}"


def compare(a: StoredCheckpoint, b: StoredCheckpoint, x: LogicalTensor, y: LogicalTensor, read_all: bool = False) -> Gap:
    """Two tensors of the same shape and dtype. What is laid out alike is compared block by block: where two blocks have the same
    checksum they are equal, and are read only for ``read_all``."""
    found = Gap()
    if x.parts == y.parts:
        for rank, box in _written(x):
            _compare_chunks(a, b, x, rank, box, read_all, found)
        return found
    places = Places(y)
    for p in x.parts:
        for q, common in places.overlapping(part_box(x, p)):
            if isinstance(p.layout, Absent) and isinstance(q.layout, Absent):  # perhaps more elements than anyone could count one by one
                one, largest = _gap_of_fills(x.dtype, p.layout.fill.hex(), q.layout.fill.hex())
                found.add(one * common.numel, largest)
                continue
            found.was_read = True
            for box in _windows(common):
                found.add(*gap(x.dtype, read_box(a, x, p, box), read_box(b, y, q, box)))
    return found


@lru_cache(4096)
def _gap_of_fills(dtype: str, a: str, b: str) -> tuple[int, float | int | None]:
    """Of one element. As text, because 0.0 and -0.0 differ."""
    return gap(dtype, fill_value(dtype, float.fromhex(a)), fill_value(dtype, float.fromhex(b)))


def _written(tensor: LogicalTensor) -> Iterator[tuple[int, Box]]:
    for part in tensor.parts:
        for rank, position in positions(tensor, part):
            for box in boxes_at(tensor.shape, part, position):
                yield rank, box


def _compare_chunks(a: StoredCheckpoint, b: StoredCheckpoint, tensor: LogicalTensor, rank: int, box: Box, read_all: bool, found: Gap) -> None:
    x, y = _chunk(a, tensor, rank, box), _chunk(b, tensor, rank, box)
    blocks = [i for i in range(block_count(x.nbytes)) if read_all or not _same_block(x, y, i)]
    for first, stop in _runs(blocks):
        found.was_read = True
        found.add(*gap(tensor.dtype, read_blocks(a, rank, x, first, stop), read_blocks(b, rank, y, first, stop)))


def _chunk(stored: StoredCheckpoint, tensor: LogicalTensor, rank: int, box: Box) -> Chunk:
    _, chunk = stored.chunk(tensor.name, box.offsets, rank)
    if chunk.sizes != box.sizes:
        raise CheckpointCorrupt(f"{stored.where}: rank {rank} wrote {tensor.name} in other boxes than its layout says. {REMEDY}")
    return chunk


def _same_block(x: Chunk, y: Chunk, number: int) -> bool:
    place = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
    return x.digests[place] == y.digests[place]


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks together, a window's worth at most."""
    first = last = -2
    for block in blocks:
        if block != last + 1 or block - first >= _RUN_BLOCKS:
            if last >= 0:
                yield first, last + 1
            first = block
        last = block
    if last >= 0:
        yield first, last + 1


def _windows(box: Box) -> Iterator[Box]:
    for start in range(0, box.numel, WINDOW_ELEMENTS):
        for inner in flat_to_boxes(box.sizes, start, min(start + WINDOW_ELEMENTS, box.numel)):
            yield shift(inner, box.offsets)
