"""A committed step, opened for reading: its manifest, and the ranks' indexes on demand. All of it is hostile input."""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import accumulate, pairwise

from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, LayoutError
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, block_count
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent, LogicalTensor, Part
from engine.format.manifest import (
    MANIFEST,
    Chunk,
    FileEntry,
    IndexHead,
    Manifest,
    frozen_index_name,
    open_index,
    read_manifest,
    read_page,
)
from engine.format.names import is_misplaced, name_problem
from engine.format.safetensors import READ_HEADER_BYTES
from engine.format.tiling import tiles
from engine.state.boxes import check_tiling, part_box
from engine.storage import Reader, Storage

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_MAX_RANKS = 1 << 20
_MAX_TENSOR_BYTES = 1 << 62
_SMALL_BYTES = 1 << 28
_MAX_FILL, _FLOATS = 65504, ("F64", "F32", "F16", "BF16", "C64", "C128")  # all of these hold it; other types are filled with zeros only
_FEW_PARTS = 16
"""Up to here parts are compared each with each, which can name the two that overlap."""


class StoredIndex:
    """What one rank wrote: its files, and its chunks page by page as they are asked for."""

    def __init__(self, storage: Storage, path: str, rank: int, manifest: Manifest) -> None:
        self._where = f"{storage.root}/{path}"
        self._tensors = manifest.tensors
        entry, reader = manifest.indexes[rank], _Reopened(storage, path, rank)
        self.head, self._sealed = open_index(reader, self._where)
        if reader.size_bytes != entry.size_bytes or self._sealed.digest != entry.digest:
            raise CheckpointCorrupt(f"{self._where}, written by rank {rank}, is not what the manifest refers to: bytes have changed. {REMEDY}")
        _check_head(
            self.head, rank if rank < manifest.summary.world_size else self.head.rank, self._sealed.body_bytes, len(self._tensors), self._where
        )
        self._firsts = [page.first_tensor for page in self.head.pages]
        self._starts = list(accumulate((page.chunks for page in self.head.pages), initial=0))
        self._pages: dict[int, list[int]] = {}
        self._places: dict[tuple[int, tuple[int, ...]], int] = {}
        self._chunks: dict[int, Chunk] = {}
        self._sound: set[tuple[object, ...]] = set()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return self.head.files

    @property
    def size_bytes(self) -> int:
        return self.body_at + self._sealed.body_bytes

    @property
    def body_at(self) -> int:
        """Where the pages begin in the file."""
        return self._sealed.body_at

    @property
    def bytes_read(self) -> int:
        """Of this index's file, so far."""
        return self._sealed.bytes_read

    def find(self, tensor: int, offsets: tuple[int, ...]) -> int | None:
        """The number of the chunk at ``offsets`` of a tensor, for :meth:`chunk`."""
        found = self._places.get((tensor, offsets))
        page = self.page_of(tensor) if found is None else -1
        if page < 0 or page in self._pages:
            return found
        self._page(page)
        return self._places.get((tensor, offsets))

    def chunk(self, number: int) -> Chunk:
        if number not in self._chunks:
            self._page(bisect_right(self._starts, number) - 1)
        return self._chunks[number]

    def record(self) -> bytes:
        """The rank's own typed record."""
        return self._sealed.page(self.head.record)

    def page_of(self, tensor: int) -> int:
        """The page that has a tensor's chunks, if any has."""
        return bisect_right(self._firsts, tensor) - 1

    def tensors_of(self, page: int) -> range:
        """The numbers of the tensors that a page may have chunks of."""
        return range(self._firsts[page], self._firsts[page + 1] if page + 1 < len(self._firsts) else len(self._tensors))

    def chunks_of(self, page: int) -> list[Chunk]:
        """In order, each checked by itself; whether they fill their files is for :mod:`engine.transfer.verify`."""
        return [self._chunks[number] for number in self._page(page)]

    def check_body(self) -> None:
        """Against the one checksum over all pages."""
        self._sealed.body()

    def _page(self, page: int) -> list[int]:
        """The numbers of its chunks."""
        if page not in self._pages:
            self._pages[page] = self._load(page)
        return self._pages[page]

    def _load(self, number: int) -> list[int]:
        page, tensors, places = self.head.pages[number], self.tensors_of(number), self._places
        for i, chunk in enumerate(read_page(self._sealed, page, self._where), self._starts[number]):
            if chunk.tensor not in tensors or not self._is_like_a_sound_one(chunk):
                problem = _chunk_problem(chunk, self.files, self._tensors)
                if not problem and chunk.tensor not in tensors:
                    problem = f"is in the page of tensors {tensors.start} to {tensors.stop}"
                if problem:
                    raise CheckpointCorrupt(f"{self._where}: a chunk of tensor {chunk.tensor} {problem}")
                self._sound.add(self._kind(chunk))
            if (chunk.tensor, chunk.offsets) in places:
                raise CheckpointCorrupt(f"{self._where}: {self._tensors[chunk.tensor].name} at {list(chunk.offsets)} is listed twice")
            self._chunks[i] = chunk
            places[chunk.tensor, chunk.offsets] = i
        return list(range(self._starts[number], self._starts[number + 1]))

    def _kind(self, chunk: Chunk) -> tuple[object, ...]:
        """All that :func:`_chunk_problem` looks at, but for where the chunk lies: most chunks are of a few kinds."""
        tensor = self._tensors[chunk.tensor]
        return chunk.offsets, chunk.sizes, chunk.nbytes, len(chunk.digests), chunk.file, tensor.shape, tensor.dtype

    def _is_like_a_sound_one(self, chunk: Chunk) -> bool:
        if self._kind(chunk) not in self._sound:
            return False
        file = self.files[chunk.file]
        return file.header_bytes <= chunk.offset and chunk.offset + chunk.nbytes <= file.size_bytes


class _Reopened:
    """A file that is opened for each read: thousands of indexes may be in use at once."""

    def __init__(self, storage: Storage, path: str, rank: int) -> None:
        self._storage, self._path, self._rank = storage, path, rank
        with self._open() as reader:
            self.size_bytes = reader.size_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        with self._open() as reader:
            reader.read_into(offset, target)

    def _open(self) -> closing[Reader]:
        try:
            return closing(self._storage.open(self._path))
        except FileNotFoundError:
            raise CheckpointCorrupt(f"{self._storage.root}/{self._path}, written by rank {self._rank}, is missing. {REMEDY}") from None


class StoredCheckpoint:
    """``folder`` is relative to the storage's root. Raises :class:`CheckpointNotFound` if no complete step is there."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder
        self.where = f"{storage.root}/{folder}" if folder else storage.root
        try:
            with closing(storage.open(self.path(MANIFEST))) as reader:
                self.manifest, self.digest = read_manifest(reader, f"{self.where}/{MANIFEST}")
                self.manifest_bytes = reader.size_bytes
        except FileNotFoundError:
            raise CheckpointNotFound(f"{self.where} holds no checkpoint: it has no file '{MANIFEST}'") from None
        if is_misplaced(os.path.basename(self.where), self.manifest.summary.step):
            raise CheckpointCorrupt(
                f"{self.where} holds step {self.manifest.summary.step}: it has been renamed or is a copy. Name it back, or remove it"
            )
        _check_manifest(self.manifest, f"{self.where}/{MANIFEST}")
        self.tensors: dict[str, LogicalTensor] = {tensor.name: tensor for tensor in self.manifest.tensors}
        self._numbers = {tensor.name: number for number, tensor in enumerate(self.manifest.tensors)}
        self._indexes: dict[int, StoredIndex] = {}
        self.sound_headers: set[tuple[int, int]] = set()
        """Of the shard files whose header has been verified: writing rank, and which of its files."""

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def index(self, rank: int) -> StoredIndex:
        """What ``rank`` wrote; opened once."""
        if rank not in self._indexes:
            self._indexes[rank] = StoredIndex(self.storage, self.path(self.manifest.index_name(rank)), rank, self.manifest)
        return self._indexes[rank]

    def chunk(self, name: str, offsets: tuple[int, ...], rank: int) -> tuple[int, Chunk]:
        """The chunk at ``offsets`` of a tensor in ``rank``'s index, and its number there."""
        index = self._indexes.get(rank) or self.index(rank)
        found = index.find(self._numbers[name], offsets)
        if found is None:
            raise CheckpointCorrupt(
                f"{self.where}/{self.manifest.index_name(rank)}: {name} at {list(offsets)} should be there by the manifest, but is not. {REMEDY}"
            )
        return found, index.chunk(found)

    def check_backed(self) -> None:
        """Raise :class:`CheckpointCorrupt` where the tensors would take memory out of proportion to the files that they are read from."""
        announced = sum(
            part_box(tensor, part).numel * ITEM_BYTES[tensor.dtype]
            for tensor in self.manifest.tensors
            for part in tensor.parts
            if not isinstance(part.layout, Absent)
        )
        if announced > _SMALL_BYTES and announced > 4 * self.size_on_disk():
            raise CheckpointCorrupt(f"{self.where}: its manifest announces {announced} bytes of tensors, which its files do not have. {REMEDY}")

    def size_on_disk(self) -> int:
        """Of all files in the step's folder, whatever is said of them."""
        found = 0
        for name in self.storage.names(self.folder):
            with suppress(EngineError, FileNotFoundError), closing(self.storage.open(self.path(name))) as reader:
                found += reader.size_bytes
        return found

    @property
    def index_bytes_read(self) -> int:
        return sum(index.bytes_read for index in self._indexes.values())


REMEDY = "Restore the file from a copy, or resume from another step (step:N)"


def _check_manifest(manifest: Manifest, where: str) -> None:
    world_size = manifest.summary.world_size
    if not 1 <= world_size <= len(manifest.indexes) or world_size > _MAX_RANKS or len(manifest.indexes) > 2 * _MAX_RANKS:
        raise CheckpointCorrupt(f"{where}: {len(manifest.indexes)} rank indexes for a world size of {world_size}")
    further = manifest.indexes[world_size:]
    odd = [entry.name for entry in manifest.indexes[:world_size] if entry.name]
    odd += [entry.name for entry in further if entry.name != frozen_index_name(entry.digest)]
    if odd:
        raise CheckpointCorrupt(f"{where}: an index named {odd[0]!r}, where that of a rank has no name and others are frozen.<its digest>.index")
    if len({entry.name for entry in further}) != len(further):
        raise CheckpointCorrupt(f"{where}: an index is named twice")
    names = {tensor.name for tensor in manifest.tensors}
    for name in (*names, *manifest.aliases):
        if problem := name_problem(name):
            raise CheckpointCorrupt(f"{where}: a tensor is called {name[:200]!r}, {problem}")
    if len(names) != len(manifest.tensors):
        raise CheckpointCorrupt(f"{where}: a tensor is listed twice")
    for alias, name in manifest.aliases.items():
        if name not in names:
            raise CheckpointCorrupt(f"{where}: {alias} is another name of {name}, which there is not")
    sound = set()  # most tensors share a few shapes and layouts
    for tensor in manifest.tensors:
        if (tensor.dtype, tensor.shape, tensor.parts) not in sound:
            try:
                _check_tensor(tensor, len(manifest.indexes))
            except LayoutError as e:
                raise CheckpointCorrupt(f"{where}: {e}") from e
            sound.add((tensor.dtype, tensor.shape, tensor.parts))


def _check_tensor(tensor: LogicalTensor, writers: int) -> None:
    """Raises :class:`LayoutError` for what no reader could compute with. Costs time in proportion to the parts."""
    told = f"{tensor.name} has dtype {tensor.dtype} and shape {list(tensor.shape)}"
    if tensor.dtype not in ITEM_BYTES or any(n < 0 for n in tensor.shape):
        raise LayoutError(told)
    if math.prod(n for n in tensor.shape if n) * ITEM_BYTES[tensor.dtype] > _MAX_TENSOR_BYTES:
        raise LayoutError(f"{told}: no tensor is that large")
    for part in tensor.parts:
        if not isinstance(part.layout, Absent) and part.layout.mesh.is_sound and part.layout.mesh.largest >= writers:
            raise LayoutError(f"{tensor.name} is laid out over writers that the {writers} indexes do not have")
        if isinstance(part.layout, Absent) and part.layout.fill and (tensor.dtype not in _FLOATS or not abs(part.layout.fill) <= _MAX_FILL):
            raise LayoutError(f"{told}, and a part to be filled with {part.layout.fill}")
        if part.narrow and ITEM_BYTES.get(part.narrow, math.inf) >= ITEM_BYTES[tensor.dtype]:
            raise LayoutError(f"{told}, and a part that is kept as {part.narrow}")
    if len(tensor.parts) <= _FEW_PARTS:
        check_tiling(tensor)
        return
    whole = [part_box(tensor, part) for part in tensor.parts]
    for part, box in zip(tensor.parts, whole, strict=True):
        if not _is_inside(part.offsets, box.sizes, tensor.shape):
            raise LayoutError(f"{tensor.name}: a part at {part.offsets} of size {part.sizes} is outside its shape {tensor.shape}")
        check_tiling(LogicalTensor(tensor.name, tensor.dtype, box.sizes, (Part(part.layout),)))  # its rule
    if not tiles(tensor.shape, [(box.offsets, box.sizes) for box in whole]):
        raise LayoutError(f"{tensor.name}: its {len(whole)} parts overlap or leave gaps")


def _is_inside(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True))


def _check_head(head: IndexHead, rank: int, body_bytes: int, tensors: int, where: str) -> None:
    if head.rank != rank:
        raise CheckpointCorrupt(f"{where} belongs to rank {head.rank}: files have been swapped")
    for file in head.files:
        if not _PLAIN_NAME.fullmatch(file.name) or not 0 < file.header_bytes <= min(file.size_bytes, READ_HEADER_BYTES):
            raise CheckpointCorrupt(
                f"{where}: it refers to a file named {file.name!r} of {file.size_bytes} bytes, {file.header_bytes} of them header"
            )
    if len({file.name for file in head.files}) != len(head.files):
        raise CheckpointCorrupt(f"{where}: a file is listed twice")
    firsts = [-1, *(page.first_tensor for page in head.pages), tensors]
    if any(a >= b for a, b in pairwise(firsts)) or any(page.chunks < 1 for page in head.pages):
        raise CheckpointCorrupt(f"{where}: its pages are not in the order of their tensors")
    end = 0
    for page in (*head.pages, head.record):
        if page.offset != end or page.size_bytes < 0:
            raise CheckpointCorrupt(f"{where}: its pages leave a gap or overlap at byte {page.offset}")
        end += page.size_bytes
    if end != body_bytes:
        raise CheckpointCorrupt(f"{where}: its pages end at byte {end} of {body_bytes}")


def _chunk_problem(chunk: Chunk, files: Sequence[FileEntry], tensors: Sequence[LogicalTensor]) -> str:
    if not 0 <= chunk.tensor < len(tensors):
        return f"is of none of the {len(tensors)} tensors"
    if not 0 <= chunk.file < len(files):
        return f"is in file {chunk.file} of {len(files)}"
    tensor, file = tensors[chunk.tensor], files[chunk.file]
    if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
        return f"has {len(chunk.sizes)} dimensions, {tensor.name} has {len(tensor.shape)}"
    if not _is_inside(chunk.offsets, chunk.sizes, tensor.shape):
        return f"lies outside {tensor.name}"
    if chunk.nbytes != math.prod(chunk.sizes) * ITEM_BYTES[tensor.dtype]:
        return f"has {chunk.nbytes} bytes for {math.prod(chunk.sizes)} elements of {tensor.dtype}"
    if chunk.offset < file.header_bytes or chunk.offset + chunk.nbytes > file.size_bytes:
        return f"at byte {chunk.offset} lies outside {file.name}"
    if len(chunk.digests) != DIGEST_BYTES * block_count(chunk.nbytes):
        return f"has {len(chunk.digests) // DIGEST_BYTES} block checksums for {-(-chunk.nbytes // BLOCK_BYTES)} blocks"
    return ""
