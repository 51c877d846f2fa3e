"""Shard files are plain safetensors, with DCP's sharding info in the header, so that stock tools read them.

Source: https://github.com/huggingface/safetensors#format; ``DCP_SHARDING_INFO`` as in
torch/distributed/checkpoint/_hf_utils.py (torch 2.8 and later).
"""

import json
import struct
from collections.abc import Sequence

from msgspec import Struct

from engine.format.dtypes import ITEM_BYTES, STORED_AS_BYTES

HEADER_ALIGN_BYTES = 4096
MAX_HEADER_BYTES = 50_000_000
"""Readers refuse headers of more than 100 MB; a rank's image is split into further files well before."""


class Entry(Struct, frozen=True, gc=False):
    """One box as it lies in a file. ``offset`` counts from the start of the data, in bytes."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    nbytes: int


def encode_header(entries: Sequence[Entry]) -> bytes:
    """The length word and the JSON, padded with spaces to a multiple of 4,096 bytes so that the data starts aligned."""
    header: dict[str, object] = {}
    sharding = {}
    for e in entries:
        dtype, offsets, sizes = e.dtype, e.offsets, e.sizes
        if dtype in STORED_AS_BYTES:
            width = ITEM_BYTES[dtype]
            dtype = "U8"
            sizes = (*sizes[:-1], sizes[-1] * width) if sizes else (width,)
            offsets = (*offsets[:-1], offsets[-1] * width) if offsets else (0,)
        header[e.name] = {"dtype": dtype, "shape": sizes, "data_offsets": (e.offset, e.offset + e.nbytes)}
        sharding[e.name] = {"saved_offsets": offsets}
    compact = (",", ":")
    info = json.dumps(sharding, separators=compact)
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": info}
    text = json.dumps({"__metadata__": metadata, **header}, separators=compact, ensure_ascii=False).encode()
    padded = -(-(8 + len(text)) // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES
    return struct.pack("<Q", padded - 8) + text.ljust(padded - 8)
