"""Shard files are plain safetensors, with DCP's sharding info in the header, so that stock tools read them.

Source: https://github.com/huggingface/safetensors#format; ``DCP_SHARDING_INFO`` as in
torch/distributed/checkpoint/_hf_utils.py (torch 2.8 and later).
"""

import json
import math
import struct
from collections.abc import Sequence
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import CheckpointCorrupt
from engine.format.dtypes import ITEM_BYTES, STORED_AS_BYTES
from engine.format.layout import Dims

HEADER_ALIGN_BYTES = 4096
MAX_HEADER_BYTES = 50_000_000
"""A rank's image is split into further files where its header would be larger, by an estimate."""
READ_HEADER_BYTES = 100_000_000
"""What the safetensors package accepts, and this reader."""


class Entry(Struct, frozen=True, gc=False):
    """One box as it lies in a file. ``offset`` counts from the start of the data, in bytes."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    nbytes: int


def as_stored(entry: Entry) -> Entry:
    """As a header has it: types that have no name there are bytes, in the last dimension."""
    if entry.dtype not in STORED_AS_BYTES:
        return entry
    width, offsets, sizes = ITEM_BYTES[entry.dtype], entry.offsets, entry.sizes
    sizes = (*sizes[:-1], sizes[-1] * width) if sizes else (width,)
    offsets = (*offsets[:-1], offsets[-1] * width) if offsets else (0,)
    return Entry(entry.name, "U8", offsets, sizes, entry.offset, entry.nbytes)


def encode_header(entries: Sequence[Entry]) -> bytes:
    """The length word and the JSON, padded with spaces to a multiple of 4,096 bytes so that the data starts aligned."""
    known: dict[tuple[object, ...], tuple[str, str]] = {}  # what entries say beside name and place: most share a few
    header, sharding = [], []
    for e in map(as_stored, entries):
        texts = known.get((e.dtype, e.sizes, e.offsets))
        if texts is None:
            texts = known[e.dtype, e.sizes, e.offsets] = (
                f'{{"dtype":{_compact(e.dtype)},"shape":{_compact(e.sizes)},"data_offsets":[',
                _compact({"saved_offsets": e.offsets}),
            )
        header.append(f",{encode_basestring(e.name)}:{texts[0]}{e.offset},{e.offset + e.nbytes}]}}")
        sharding.append(f"{encode_basestring_ascii(e.name)}:{texts[1]}")
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": f"{{{','.join(sharding)}}}"}
    text = f'{{"__metadata__":{_compact(metadata)}{"".join(header)}}}'.encode()
    padded = -(-(8 + len(text)) // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES
    return struct.pack("<Q", padded - 8) + text.ljust(padded - 8)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class _Tensor(Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Dims
    data_offsets: tuple[int, int]


class _Sharding(Struct):
    saved_offsets: Dims


def decode_header(data: bytes, where: str) -> list[Entry]:
    """The boxes of a file, as they lie in it; ``data`` is its header with the length word.

    Raises :class:`CheckpointCorrupt` for all that is not a header of :func:`encode_header`, down to keys given twice and holes.
    """
    try:
        (size_bytes,) = struct.unpack_from("<Q", data)
        if size_bytes != len(data) - 8:
            raise ValueError(f"its length word says {size_bytes} bytes, {len(data) - 8} expected")
        header = _parse(data[8:])
        metadata = msgspec.convert(header.pop("__metadata__", None), dict[str, str])
        tensors = msgspec.convert(header, dict[str, _Tensor])
        sharding = msgspec.convert(_parse(metadata.get("DCP_SHARDING_INFO", "null")), dict[str, _Sharding])
        if sharding.keys() != tensors.keys():
            raise ValueError("DCP_SHARDING_INFO names other tensors than the file has")
        return _placed([_entry(name, tensor, sharding[name].saved_offsets) for name, tensor in tensors.items()])
    except (ValueError, TypeError, AttributeError, RecursionError, struct.error, msgspec.ValidationError) as e:
        raise CheckpointCorrupt(f"{where} has a header that safetensors files of a checkpoint do not have: {e}") from e


def _parse(text: str | bytes) -> Any:
    """JSON in which no object has a key twice: readers would disagree on which of the two counts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _entry(name: str, tensor: _Tensor, offsets: tuple[int, ...]) -> Entry:
    begin, end = tensor.data_offsets
    if tensor.dtype not in ITEM_BYTES or min(tensor.shape, default=0) < 0 or len(offsets) != len(tensor.shape):
        raise ValueError(f"{name!r} has dtype {tensor.dtype!r}, shape {tensor.shape} and offsets {offsets}")
    if end - begin != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise ValueError(f"{name!r} of {tensor.dtype} and shape {tensor.shape} has {end - begin} bytes")
    return Entry(name, tensor.dtype, offsets, tensor.shape, begin, end - begin)


def _placed(entries: list[Entry]) -> list[Entry]:
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    end = 0
    for entry in entries:
        if entry.offset != end:
            raise ValueError(f"{entry.name!r} begins at {entry.offset}, where {end} is expected")
        end += entry.nbytes
    return entries
