"""Write: images to files, checksummed in the same pass, durable when it returns. No torch: a writer process runs this."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Protocol

from msgspec import Struct

from engine.errors import StorageError
from engine.format.checksum import BLOCK_BYTES, block_digests, digest
from engine.format.manifest import (
    Chunk,
    FileEntry,
    IndexEntry,
    RankIndex,
    encode_index,
    frozen_index_name,
    frozen_name,
    index_name,
    shard_name,
)
from engine.format.record import EMPTY_RECORD
from engine.plan.image import Image, ShardLayout
from engine.storage import Storage, Writer

WINDOW_BYTES = 16 * 1024 * 1024
"""What is written at once. A multiple of the checksum block."""


class Segment(Struct, frozen=True):
    """``data`` goes next into the file. It holds entries [first, stop) whole, or (``partial``) a run of blocks of entry ``first``.
    Valid until the next but one is asked for."""

    first: int
    stop: int
    partial: bool
    data: memoryview


class Images(Protocol):
    """The bytes of a layout's images, by the image's number."""

    def stream(self, number: int, take: Callable[[Segment], None]) -> Iterator[memoryview]:
        """The whole file in order, header first, each piece to be written before the next but one is asked for. ``take`` gets the data of
        each entry before, or right after, it has gone by."""
        ...


class Reuse(Protocol):
    """What is known of files of content that does not change, from save to save."""

    def take(self, path: str, is_sound: Callable[[str], bool]) -> bool:
        """Whether the file, an attempt's, has got its content by a link from an earlier step. ``is_sound`` reads a file of that name and
        says whether it has that content."""
        ...

    def wrote(self, path: str) -> None:
        """The file has been written, as there was none to link."""
        ...


class NoReuse:
    def take(self, path: str, is_sound: Callable[[str], bool]) -> bool:
        return False

    def wrote(self, path: str) -> None: ...


class Written(Struct, frozen=True, array_like=True):
    """What a rank wrote: how the manifest refers to its index, and to that of what does not change, where there is one; the bytes of all
    its files, and of those that were linked. ``digests``: of each frozen tensor's bytes here, by its number. ``changed``: the numbers of
    frozen tensors whose bytes are others than at the save before."""

    index: IndexEntry
    size_bytes: int
    frozen: IndexEntry | None = None
    reused_bytes: int = 0
    digests: dict[int, bytes] = {}
    changed: tuple[int, ...] = ()


def write_shards(storage: Storage, folder: str, layout: ShardLayout, images: Images, record: bytes, reuse: Reuse | None = None) -> Written:
    """A rank's files and their index, durable with their names when this returns. ``record``: the rank's own typed record."""
    files, chunks = [], []
    for number in range(layout.first_frozen):
        name = shard_name(layout.rank, number)
        digests = _write_image(storage, f"{folder}/{name}", layout.images[number], partial(images.stream, number))
        _enter(layout, number, 0, name, digests, files, chunks)
    data, entry = encode_index(RankIndex(layout.rank, tuple(files), tuple(chunks), record), layout.classes)
    write_whole(storage, f"{folder}/{index_name(layout.rank)}", data)
    written = Written(entry, len(data) + sum(file.size_bytes for file in files))
    if layout.has_frozen:
        written = _write_frozen(storage, folder, layout, images, reuse or NoReuse(), written)
    storage.sync_folder(folder)
    return written


def _write_frozen(storage: Storage, folder: str, layout: ShardLayout, images: Images, reuse: Reuse, own: Written) -> Written:
    """Content decides: what equals a file of the step before is linked, whatever was expected of it."""
    files, chunks, by_tensor, reused = [], [], dict[int, bytes](), 0
    for number in range(layout.first_frozen, len(layout.images)):
        image = layout.images[number]
        digests = _digests_of(image, partial(images.stream, number))
        name = frozen_name(digest(image.header), digests)
        if reuse.take(f"{folder}/{name}", partial(_holds, storage, image, digests)):
            reused += image.size_bytes
        elif _write_image(storage, f"{folder}/{name}", image, partial(images.stream, number)) != digests:
            raise StorageError(f"{storage.root}/{folder}/{name}: memory changed while it was written; is it faulty?")
        else:
            reuse.wrote(f"{folder}/{name}")
        _enter(layout, number, layout.first_frozen, name, digests, files, chunks)
        for tensor, blocks in zip(layout.numbers[number], digests, strict=True):
            by_tensor[tensor] = digest(by_tensor.get(tensor, b"") + blocks)
    data, entry = encode_index(RankIndex(layout.rank, tuple(files), tuple(chunks), EMPTY_RECORD), layout.classes)
    name = frozen_index_name(entry.digest)
    if reuse.take(f"{folder}/{name}", lambda path: storage.read(path, len(data)) == data):
        reused += len(data)
    else:
        write_whole(storage, f"{folder}/{name}", data)
        reuse.wrote(f"{folder}/{name}")
    size_bytes = own.size_bytes + len(data) + sum(file.size_bytes for file in files)
    return Written(own.index, size_bytes, IndexEntry(entry.size_bytes, entry.digest, name), reused, by_tensor)


def _holds(storage: Storage, image: Image, digests: list[bytes], path: str) -> bool:
    """Whether a file holds what the image does, by the digests of its blocks."""
    with closing(storage.open(path)) as reader:
        header = bytearray(len(image.header))
        if reader.size_bytes != image.size_bytes:
            return False
        reader.read_into(0, memoryview(header))
        found, window = _Digests(image), memoryview(bytearray(min(WINDOW_BYTES, image.size_bytes)))
        for first, stop, is_part, begin, end in windows(image):
            reader.read_into(len(header) + begin, window[: end - begin])
            found.take(Segment(first, stop, is_part, window[: end - begin]))
    return header == image.header and found.found == digests


def _enter(layout: ShardLayout, number: int, first: int, name: str, digests: list[bytes], files: list[FileEntry], chunks: list[Chunk]) -> None:
    """A file into an index whose first file is number ``first`` of the layout."""
    image = layout.images[number]
    start = len(image.header)
    files.append(FileEntry(name, image.size_bytes, start, digest(image.header)))
    for entry, tensor, blocks in zip(image.entries, layout.numbers[number], digests, strict=True):
        chunks.append(Chunk(tensor, entry.offsets, entry.sizes, number - first, start + entry.offset, entry.nbytes, blocks))


class _Digests:
    """The block digests of an image's entries, as its bytes go by."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.found = [b""] * len(image.entries)

    def take(self, segment: Segment) -> None:
        if segment.partial:
            self.found[segment.first] += block_digests(segment.data)
            return
        begin = self._image.entries[segment.first].offset
        for i in range(segment.first, segment.stop):
            entry = self._image.entries[i]
            self.found[i] = block_digests(segment.data[entry.offset - begin : entry.offset - begin + entry.nbytes])


_Stream = Callable[[Callable[[Segment], None]], Iterator[memoryview]]


def _digests_of(image: Image, stream: _Stream) -> list[bytes]:
    digests = _Digests(image)
    for _ in stream(digests.take):
        pass
    return digests.found


def _write_image(storage: Storage, path: str, image: Image, stream: _Stream) -> list[bytes]:
    digests = _Digests(image)
    writer = storage.create(path, image.size_bytes)
    try:
        if image.size_bytes <= WINDOW_BYTES:
            for data in stream(digests.take):
                writer.write(data)
        else:
            _write_behind(writer, stream(digests.take))
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return digests.found


def _write_behind(writer: Writer, pieces: Iterator[memoryview]) -> None:
    """While one piece is written, the next is checksummed: the disk does not wait for that."""
    with ThreadPoolExecutor(1) as thread:
        before: Future[None] | None = None
        for data in pieces:
            if before is not None:
                before.result()
            before = thread.submit(writer.write, data)
        if before is not None:
            before.result()


def windows(image: Image) -> Iterator[tuple[int, int, bool, int, int]]:
    """How an image's data goes in windows: (first, stop, partial, begin, end) as of :class:`Segment`, bytes within the data."""
    first, entries = 0, image.entries
    while first < len(entries):
        begin, stop = entries[first].offset, first
        while stop < len(entries) and entries[stop].offset + entries[stop].nbytes - begin <= WINDOW_BYTES:
            stop += 1
        if stop > first:
            yield first, stop, False, begin, entries[stop - 1].offset + entries[stop - 1].nbytes
            first = stop
        else:
            end = begin + entries[first].nbytes
            yield from ((first, first + 1, True, at, min(at + WINDOW_BYTES, end)) for at in range(begin, end, WINDOW_BYTES))
            first += 1


class MemoryImages:
    """Images that lie one after another in ``memory``, each at its place of :func:`places`, headers included."""

    def __init__(self, memory: memoryview, layout: ShardLayout) -> None:
        self._memory, self._layout = memory, layout
        self._places = places(layout)

    def stream(self, number: int, take: Callable[[Segment], None]) -> Iterator[memoryview]:
        """In windows that are whole pages, whatever entries they cut: such can bypass the page cache."""
        image, begin = self._layout.images[number], self._places[number]
        start, pending = begin + len(image.header), windows(image)
        taken = 0
        for at in range(0, image.size_bytes, WINDOW_BYTES):
            stop = min(at + WINDOW_BYTES, image.size_bytes)
            while taken < stop - len(image.header):
                first, last, is_part, low, taken = next(pending)
                take(Segment(first, last, is_part, self._memory[start + low : start + taken]))
            yield self._memory[begin + at : begin + stop]
        for first, last, is_part, low, taken in pending:  # empty ones at the end
            take(Segment(first, last, is_part, self._memory[start + low : start + taken]))


_ALIGN_BYTES = 4096


def places(layout: ShardLayout) -> list[int]:
    """Where each image begins in memory, a page of its own; last, the size of all."""
    found = [0]
    for image in layout.images:
        found.append(-(-(found[-1] + image.size_bytes) // _ALIGN_BYTES) * _ALIGN_BYTES)
    return found


def write_whole(storage: Storage, path: str, data: bytes) -> None:
    """A small file, durable when this returns."""
    writer = storage.create(path)
    try:
        writer.write(memoryview(data))
    except BaseException:
        writer.abandon()
        raise
    writer.close()


assert WINDOW_BYTES % BLOCK_BYTES == 0
