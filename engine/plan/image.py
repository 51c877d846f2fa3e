"""A rank's files as images in memory: header, then boxes at their final offsets."""

from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii

from msgspec import Struct

from engine.format.dtypes import ITEM_BYTES
from engine.format.safetensors import MAX_HEADER_BYTES, Entry, encode_header

_ENTRY_BYTES = 220  # about what a header spends on an entry beside its name, which it has twice


class Source(Struct, frozen=True, gc=False):
    """One box to be written: ``item`` is its place in the caller's list. ``frozen``: it is not expected to change."""

    item: int
    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int
    frozen: bool = False


class Image(Struct, frozen=True, gc=False):
    """One file. ``entries[i]`` is the box of ``items[i]``; data begins at ``len(header)`` and has no holes."""

    header: bytes
    entries: tuple[Entry, ...]
    items: tuple[int, ...]
    data_bytes: int

    @property
    def size_bytes(self) -> int:
        return len(self.header) + self.data_bytes


class ShardLayout(Struct, frozen=True, gc=False):
    """All that a rank writes of one plan, but for the bytes: its files, the numbers in the manifest of their entries' tensors, and the
    geometry classes that its index is paged by. The files from ``first_frozen`` on are of what does not change, with an index of their
    own if ``has_frozen``. Plain data: a writer process gets it once."""

    rank: int
    images: tuple[Image, ...]
    numbers: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]
    first_frozen: int
    has_frozen: bool


def shard_layout(rank: int, sources: Sequence[Source], numbers: Mapping[str, int], classes: Sequence[int], has_frozen: bool = False) -> ShardLayout:
    """``numbers``: of each tensor in the manifest. What a reshard reads together lies together."""
    ordered = sorted(sources, key=lambda source: numbers[source.name])  # stable
    images = lay_out([source for source in ordered if not source.frozen])
    first_frozen = len(images)
    images += lay_out([source for source in ordered if source.frozen])
    by_entry = tuple(tuple(numbers[entry.name] for entry in image.entries) for image in images)
    return ShardLayout(rank, tuple(images), by_entry, tuple(classes), first_frozen, has_frozen)


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
        need = 2 * len(encode_basestring_ascii(source.name)) + _ENTRY_BYTES  # as text: what is not ASCII is longer there
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
