"""A rank's files as images in memory: header, then boxes at their final offsets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct

from engine.format.dtypes import ITEM_BYTES
from engine.format.safetensors import MAX_HEADER_BYTES, Entry, encode_header

_ENTRY_BYTES = 220  # about what a header spends on an entry beside its name, which it has twice


class Source(Struct, frozen=True, gc=False):
    """One box to be written: ``item`` is its place in the caller's list."""

    item: int
    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Image:
    """One file. ``entries[i]`` is the box of ``items[i]``; data begins at ``len(header)`` and has no holes."""

    header: bytes
    entries: tuple[Entry, ...]
    items: tuple[int, ...]
    data_bytes: int


def lay_out(sources: Sequence[Source]) -> list[Image]:
    """Files for the boxes of one rank: at most one box of a tensor in a file, headers below the readers' limit, larger items
    first so that every box is aligned to its item size."""
    files: list[list[Source]] = []
    seen: dict[str, int] = {}
    for source in sources:
        number = seen.get(source.name, 0)
        seen[source.name] = number + 1
        while len(files) <= number:
            files.append([])
        files[number].append(source)
    return [_image(part) for group in files for part in _split(group)]


def _split(sources: list[Source]) -> list[list[Source]]:
    parts, size = [[]], 0
    for source in sources:
        need = 2 * len(json.dumps(source.name)) + _ENTRY_BYTES  # as text: what is not ASCII is longer there
        if size + need > MAX_HEADER_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(source)
        size += need
    return parts


def _image(sources: list[Source]) -> Image:
    ordered = sorted(sources, key=lambda s: -ITEM_BYTES[s.dtype])
    entries, offset = [], 0
    for s in ordered:
        entries.append(Entry(s.name, s.dtype, s.offsets, s.sizes, offset, s.nbytes))
        offset += s.nbytes
    return Image(encode_header(entries), tuple(entries), tuple(s.item for s in ordered), offset)
