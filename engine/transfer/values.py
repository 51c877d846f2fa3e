"""Elements of stored tensors as NumPy arrays, every block verified, and how far two such arrays are apart. No torch."""

import math
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from engine.errors import CheckpointCorrupt, IncompatibleCheckpoint
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, digest
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent, LogicalTensor, Part
from engine.format.manifest import Chunk
from engine.state.boxes import Box, flat_span, flat_to_boxes, intersect, shift, writers
from engine.transfer.stored import REMEDY, StoredCheckpoint

WINDOW_ELEMENTS = 1 << 20
"""What is compared at once."""
RUN_BLOCKS = 64
"""What is read at once: 8 MiB."""

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64, "C128": np.complex128}
_SIGNED = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8}
_UNSIGNED = {"U64", "U32", "U16", "U8", "BOOL"}


def raw_type(dtype: str) -> np.dtype:
    """Of an array that holds elements bit for bit, whatever they mean."""
    return np.dtype(_RAW[ITEM_BYTES[dtype]])


def read_blocks(stored: StoredCheckpoint, rank: int, chunk: Chunk, first: int, stop: int) -> np.ndarray:
    """The elements in blocks [first, stop) of a chunk, raw. Raises :class:`CheckpointCorrupt`."""
    tensor, file = stored.manifest.tensors[chunk.tensor], stored.index(rank).files[chunk.file]
    where = f"{stored.where}/{file.name}, written by rank {rank}"
    begin = first * BLOCK_BYTES
    data = bytearray(min(stop * BLOCK_BYTES, chunk.nbytes) - begin)
    try:
        with closing(stored.storage.open(stored.path(file.name))) as reader:
            reader.read_into(chunk.offset + begin, memoryview(data))
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{where}, is missing. {REMEDY}") from None
    for block in range(first, stop):
        part = memoryview(data)[block * BLOCK_BYTES - begin : (block + 1) * BLOCK_BYTES - begin]
        if digest(part) != chunk.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            at = chunk.offset + block * BLOCK_BYTES
            raise CheckpointCorrupt(f"{where}: bytes {at} to {at + len(part)}, of {tensor.name}, have changed. {REMEDY}")
    return np.frombuffer(data, raw_type(tensor.dtype))


def read_box(stored: StoredCheckpoint, tensor: LogicalTensor, part: Part, box: Box) -> np.ndarray:
    """The elements of a box within a part, raw, from whichever ranks wrote them."""
    found = np.empty(box.sizes, raw_type(tensor.dtype))
    if isinstance(part.layout, Absent):
        found[...] = fill_value(tensor.dtype, part.layout.fill)
        return found
    missing = box.numel
    for rank, source, overlap in writers(tensor, part, box):
        _, chunk = stored.chunk(tensor.name, source.offsets, rank)
        if chunk.sizes != source.sizes:
            raise CheckpointCorrupt(f"{stored.where}: rank {rank} wrote {tensor.name} in other boxes than its layout says. {REMEDY}")
        inner = shift(overlap, source.offsets, -1)
        for elements, at in _pieces(stored, rank, chunk, inner):
            goal = shift(shift(at, source.offsets), box.offsets, -1)
            found[_region(goal)] = elements
        missing -= overlap.numel
    if missing:
        raise CheckpointCorrupt(f"{stored.where}: {missing} elements of {tensor.name} are in no shard. {REMEDY}")
    return found


def _pieces(stored: StoredCheckpoint, rank: int, chunk: Chunk, inner: Box) -> Iterator[tuple[np.ndarray, Box]]:
    """The elements of ``inner``, a box within a chunk, and where in the chunk each piece lies."""
    width = ITEM_BYTES[stored.manifest.tensors[chunk.tensor].dtype]
    low, high = flat_span(chunk.sizes, inner)
    first, stop = low * width // BLOCK_BYTES, -(-high * width // BLOCK_BYTES)
    for begin in range(first, stop, RUN_BLOCKS):
        flat = read_blocks(stored, rank, chunk, begin, min(begin + RUN_BLOCKS, stop))
        start, position = begin * BLOCK_BYTES // width, 0
        for box in flat_to_boxes(chunk.sizes, start, start + flat.size):
            overlap = intersect(box, inner)
            if overlap is not None:
                yield flat[position : position + box.numel].reshape(box.sizes)[_region(shift(overlap, box.offsets, -1))], overlap
            position += box.numel


def _region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


def fill_value(dtype: str, fill: float) -> np.ndarray:
    """One raw element. Raises :class:`IncompatibleCheckpoint` for a type whose values are not known here, but for zero."""
    raw = raw_type(dtype)
    if fill == 0 and not math.copysign(1, fill) < 0:
        return np.zeros((), raw)
    with np.errstate(all="ignore"):  # a fill may be anything
        if dtype == "BF16":
            bits = int(np.float32(fill).view(np.uint32))
            return np.array((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if fill == fill else 0x7FC0, raw)  # to nearest even
        kind = _FLOATS.get(dtype) or _SIGNED.get(dtype) or (np.bool_ if dtype == "BOOL" else raw if dtype in _UNSIGNED else None)
        if kind is None:
            raise IncompatibleCheckpoint(f"elements of {dtype} that are declared absent and to be filled with {fill} cannot be compared")
        return np.array(fill).astype(kind).view(raw)


def gap(dtype: str, a: np.ndarray, b: np.ndarray) -> tuple[int, float | int | None]:
    """How many elements differ in a bit, and the largest |a − b|: infinite where only one is NaN, None for a type that is not known
    here. Zeros of both signs differ, by 0."""
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    if ITEM_BYTES[dtype] == 16:
        differ = (a.view(np.uint64) != b.view(np.uint64)).reshape(-1, 2).any(axis=1)
    else:
        differ = a != b
    count = int(differ.sum())
    if not count:
        return 0, 0
    a, b = a[differ], b[differ]
    if dtype in _UNSIGNED or dtype in _SIGNED:
        x, y = (v.view(_SIGNED[dtype]) if dtype in _SIGNED else v for v in (a, b))
        return count, int((np.maximum(x, y).view(a.dtype) - np.minimum(x, y).view(a.dtype)).max())  # right also past the signed range
    if dtype == "BF16":
        a, b = ((v.astype(np.uint32) << 16).view(np.float32) for v in (a, b))
    elif dtype in _FLOATS:
        a, b = a.view(_FLOATS[dtype]), b.view(_FLOATS[dtype])
    else:
        return count, None
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.astype(wide) - b.astype(wide))
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    return count, float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
