"""Reads a checkpoint as docs/format.md describes it, and with nothing of ours: what somebody else would write. Slow and plain."""

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

BLOCK = 131_072
_TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?", "BF16": "u2"}
Box = tuple[tuple[int, ...], tuple[int, ...]]


def _open(path: Path, kind: int) -> tuple[Any, bytes, bytes]:
    """The head, the body, and the digest of envelope and head."""
    data = path.read_bytes()
    magic, version, found, head_bytes, body_bytes, head_digest, body_digest = struct.unpack("<8sHHIQ16s16s", data[:56])
    assert (magic, version, found, len(data)) == (b"lockstep", 1, kind, 56 + head_bytes + body_bytes)
    head, body = data[56 : 56 + head_bytes], data[56 + head_bytes :]
    assert xxhash.xxh3_128_digest(head) == head_digest
    assert xxhash.xxh3_128_digest(body) == body_digest
    return msgspec.msgpack.decode(head), body, xxhash.xxh3_128_digest(data[: 56 + head_bytes])


def read(step: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """The summary, the shared record, and every tensor whole."""
    summary, body, _ = _open(step / "manifest", 1)
    manifest = msgspec.msgpack.decode(body)
    assert len(manifest["indexes"]) >= summary["world_size"]
    indexes = [_read_index(step, writer, summary["world_size"], *entry) for writer, entry in enumerate(manifest["indexes"])]
    tensors = {}
    for number, (name, dtype, shape, parts) in enumerate(manifest["tensors"]):
        whole, covered = np.empty(shape, _TYPES[dtype]), np.zeros(shape, int)
        for layout, offsets, sizes, _narrow in parts:
            origin, extent = (tuple(offsets), tuple(sizes)) if sizes else ((0,) * len(shape), tuple(shape))
            if layout[0] == "absent":
                whole[_slices((origin, extent))] = layout[1]
                covered[_slices((origin, extent))] += 1
                continue
            for rank, (inner, box_sizes) in _written(layout, extent):
                box = (tuple(o + i for o, i in zip(origin, inner, strict=True)), box_sizes)
                whole[_slices(box)] = indexes[rank][number, box].view(_TYPES[dtype]).reshape(box_sizes)
                covered[_slices(box)] += 1
        assert (covered == 1).all(), f"{name} is not covered once"
        tensors[name] = whole
    return summary, record(manifest["record"]), tensors


def _read_index(step: Path, writer: int, world_size: int, size_bytes: int, digest: bytes, name: str) -> dict[tuple[int, Box], np.ndarray]:
    """The bytes of each chunk, by tensor and box."""
    assert (name == "") == (writer < world_size)
    path = step / (name or f"rank_{writer:05d}.index")
    head, body, found = _open(path, 2)
    assert (path.stat().st_size, found) == (size_bytes, digest)
    assert name == f"frozen.{digest.hex()}.index" if name else head["rank"] == writer
    chunks, end = {}, 0
    files = [_read_file(step / file, *rest) for file, *rest in head["files"]]
    for first, count, offset, size, page_digest in head["pages"]:
        page = body[offset : offset + size]
        assert offset == end
        assert xxhash.xxh3_128_digest(page) == page_digest
        end = offset + size
        listed = msgspec.msgpack.decode(page)
        assert len(listed) == count
        assert listed[0][0] == first
        for tensor, offsets, sizes, file, at, nbytes, digests in listed:
            data = files[file][at : at + nbytes]
            blocks = [data[i : i + BLOCK] for i in range(0, max(nbytes, 1), BLOCK)]
            assert b"".join(map(xxhash.xxh3_128_digest, blocks)) == digests
            chunks[tensor, (tuple(offsets), tuple(sizes))] = np.frombuffer(data, "u1")
    assert head["record"][2:4] == [end, len(body) - end]
    own = record(body[end:])
    assert own is None if name else {"rng", "objects"} == own.keys()
    return chunks


def _read_file(path: Path, size_bytes: int, header_bytes: int, header_digest: bytes) -> bytes:
    data = path.read_bytes()
    assert len(data) == size_bytes
    assert xxhash.xxh3_128_digest(data[:header_bytes]) == header_digest
    assert struct.unpack("<Q", data[:8]) == (header_bytes - 8,)
    json.loads(data[8:header_bytes])
    return data


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(*box, strict=True))


def _written(layout: list[Any], extent: tuple[int, ...]) -> list[tuple[int, Box]]:
    """(writer, box) of all that is written of a part of this extent."""
    kind, (shape, first, strides, ranks), *rule = layout
    found = []
    for position, index in enumerate(itertools.product(*map(range, shape))):
        steps = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        rank = ranks[position] if ranks else first + sum(i * s for i, s in zip(index, steps, strict=True))
        boxes = _grid(shape, index, *rule, extent) if kind == "grid" else _flat(position, *rule, extent)
        found += [(rank, box) for box in boxes]
    return found


def _grid(shape: list[int], index: tuple[int, ...], dims: list[int], writer: int, extent: tuple[int, ...]) -> list[Box]:
    offsets, sizes, number = [0] * len(extent), list(extent), 0
    for dim, i, count in zip(dims, index, shape, strict=True):
        if dim == -1:
            number = number * count + i
            continue
        piece = -(-sizes[dim] // count)
        begin = min(i * piece, sizes[dim])
        offsets[dim] += begin
        sizes[dim] = min(piece, sizes[dim] - begin)
    is_first = all(i == 0 for dim, i in zip(dims, index, strict=True) if dim != -1)
    written = math.prod(sizes) > 0 or (math.prod(extent) == 0 and is_first)
    return [(tuple(offsets), tuple(sizes))] if number == writer and written else []


def _flat(position: int, start: int, chunk: int, extent: tuple[int, ...]) -> list[Box]:
    numel = math.prod(extent)
    low = min(max(position * chunk - start, 0), numel)
    high = min(max((position + 1) * chunk - start, 0), numel)
    if numel == 0:
        return [((0,) * len(extent), extent)] if position == 0 else []
    return _boxes(extent, low, high) if low < high else []


def _boxes(extent: tuple[int, ...], low: int, high: int) -> list[Box]:
    """An incomplete head row, whole rows, an incomplete tail row."""
    if len(extent) <= 1:
        return [((low,) if extent else (), (high - low,) if extent else ())]
    inner = math.prod(extent[1:])
    found = []
    while low < high:
        row, begin = divmod(low, inner)
        if begin == 0 and high - low >= inner:
            rows = (high - low) // inner
            found.append(((row,) + (0,) * (len(extent) - 1), (rows, *extent[1:])))
            low += rows * inner
        else:
            end = min(high - row * inner, inner)
            found += [((row, *offsets), (1, *sizes)) for offsets, sizes in _boxes(extent[1:], begin, end)]
            low = row * inner + end
    return found


def record(data: bytes) -> Any:
    def extension(code: int, inner: memoryview) -> Any:
        if code == 1:
            return tuple(record(bytes(inner)))
        if code == 2:
            return int.from_bytes(inner, "little", signed=True)
        if code == 3:
            return complex(*struct.unpack("<dd", inner))
        assert code in (4, 5), code
        return ("reference" if code == 4 else "array", *msgspec.msgpack.decode(inner))

    return msgspec.msgpack.decode(data, ext_hook=extension)
