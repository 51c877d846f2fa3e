"""A committed step, opened for reading: its manifest, and the ranks' indexes on demand. All of it is hostile input."""

import math
import re

from engine.errors import CheckpointCorrupt, CheckpointNotFound, LayoutError
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, block_count, digest
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent, Layout, LogicalTensor
from engine.format.manifest import MANIFEST, MAX_ENVELOPE_BYTES, Chunk, Manifest, RankIndex, decode, index_name
from engine.state.boxes import check_tiling
from engine.storage import Storage

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_MAX_DIMS = 64


class StoredCheckpoint:
    """``folder`` is relative to the storage's root. Raises :class:`CheckpointNotFound` if no complete step is there."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder
        self.where = f"{storage.root}/{folder}" if folder else storage.root
        try:
            data = storage.read(f"{folder}/{MANIFEST}" if folder else MANIFEST, MAX_ENVELOPE_BYTES)
        except FileNotFoundError:
            raise CheckpointNotFound(f"{self.where} holds no checkpoint: it has no file '{MANIFEST}'") from None
        self.digest = digest(data)
        self.manifest = decode(data, Manifest, f"{self.where}/{MANIFEST}")
        _check_manifest(self.manifest, f"{self.where}/{MANIFEST}")
        self.tensors: dict[str, LogicalTensor] = {tensor.name: tensor for tensor in self.manifest.tensors}
        self._numbers = {tensor.name: number for number, tensor in enumerate(self.manifest.tensors)}
        self._indexes: dict[int, RankIndex] = {}
        self._places: dict[int, dict[tuple[int, tuple[int, ...]], tuple[int, Chunk]]] = {}

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def index(self, rank: int) -> RankIndex:
        """What ``rank`` wrote; read and verified once."""
        if rank not in self._indexes:
            self._indexes[rank] = self._read_index(rank)
        return self._indexes[rank]

    def _read_index(self, rank: int) -> RankIndex:
        name = index_name(rank)
        where = f"{self.where}/{name}"
        entry = self.manifest.indexes[rank]
        try:
            data = self.storage.read(self.path(name), MAX_ENVELOPE_BYTES)
        except FileNotFoundError:
            raise CheckpointCorrupt(f"{where}, written by rank {rank}, is missing. {REMEDY}") from None
        if len(data) != entry.size_bytes or digest(data) != entry.digest:
            raise CheckpointCorrupt(f"{where}, written by rank {rank}, is not what the manifest refers to: bytes have changed. {REMEDY}")
        index = decode(data, RankIndex, where)
        _check_index(index, rank, self.manifest.tensors, where)
        return index

    def chunk(self, name: str, offsets: tuple[int, ...], rank: int) -> tuple[int, Chunk]:
        """The chunk at ``offsets`` of a tensor in ``rank``'s index, and its number there."""
        places = self._places.get(rank)
        if places is None:
            chunks = self.index(rank).chunks
            places = self._places[rank] = {(chunk.tensor, chunk.offsets): (i, chunk) for i, chunk in enumerate(chunks)}
        found = places.get((self._numbers[name], offsets))
        if found is None:
            raise CheckpointCorrupt(
                f"{self.where}/{index_name(rank)}: {name} at {list(offsets)} should be there by the manifest, but is not. {REMEDY}"
            )
        return found


REMEDY = "Restore the file from a copy, or resume from another step (step:N)"


def _check_manifest(manifest: Manifest, where: str) -> None:
    if len(manifest.indexes) != manifest.world_size or manifest.world_size < 1:
        raise CheckpointCorrupt(f"{where}: {len(manifest.indexes)} rank indexes for a world size of {manifest.world_size}")
    if len({tensor.name for tensor in manifest.tensors}) != len(manifest.tensors):
        raise CheckpointCorrupt(f"{where}: a tensor is listed twice")
    sound = set()  # most tensors share a few shapes and layouts
    for tensor in manifest.tensors:
        if tensor.dtype not in ITEM_BYTES or len(tensor.shape) > _MAX_DIMS or any(n < 0 for n in tensor.shape):
            raise CheckpointCorrupt(f"{where}: {tensor.name} has dtype {tensor.dtype} and shape {list(tensor.shape)}")
        if (tensor.shape, tensor.parts) in sound:
            continue
        if any(_has_other_ranks(part.layout, manifest.world_size) for part in tensor.parts):
            raise CheckpointCorrupt(f"{where}: {tensor.name} is laid out over ranks that a world size of {manifest.world_size} does not have")
        try:
            check_tiling(tensor)
        except LayoutError as e:
            raise CheckpointCorrupt(f"{where}: {e}") from e
        sound.add((tensor.shape, tensor.parts))


def _has_other_ranks(layout: Layout, world_size: int) -> bool:
    if isinstance(layout, Absent):
        return False
    ranks = layout.mesh.ranks
    return layout.mesh.size > world_size if not ranks else min(ranks) < 0 or max(ranks) >= world_size


def _check_index(index: RankIndex, rank: int, tensors: tuple[LogicalTensor, ...], where: str) -> None:
    if index.rank != rank:
        raise CheckpointCorrupt(f"{where} belongs to rank {index.rank}: files have been swapped")
    for file in index.files:
        if not _PLAIN_NAME.fullmatch(file.name) or not 0 < file.header_bytes <= file.size_bytes:
            raise CheckpointCorrupt(f"{where}: it refers to a file named {file.name!r} of {file.size_bytes} bytes")
    ends: dict[int, int] = {}
    for chunk in sorted(index.chunks, key=lambda c: (c.file, c.offset, c.nbytes)):
        problem = _chunk_problem(chunk, index, tensors, ends)
        if problem:
            raise CheckpointCorrupt(f"{where}: a chunk of tensor {chunk.tensor} {problem}")
        ends[chunk.file] = chunk.offset + chunk.nbytes
    for number, file in enumerate(index.files):
        if ends.get(number, file.header_bytes) != file.size_bytes:
            raise CheckpointCorrupt(f"{where}: {file.name} has {file.size_bytes} bytes, its chunks end at {ends.get(number, file.header_bytes)}")


def _chunk_problem(chunk: Chunk, index: RankIndex, tensors: tuple[LogicalTensor, ...], ends: dict[int, int]) -> str:
    if not 0 <= chunk.tensor < len(tensors):
        return f"is of none of the {len(tensors)} tensors"
    if not 0 <= chunk.file < len(index.files):
        return f"is in file {chunk.file} of {len(index.files)}"
    tensor, file = tensors[chunk.tensor], index.files[chunk.file]
    if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
        return f"has {len(chunk.sizes)} dimensions, {tensor.name} has {len(tensor.shape)}"
    if any(o < 0 or s < 0 or o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)):
        return f"lies outside {tensor.name}"
    if chunk.nbytes != math.prod(chunk.sizes) * ITEM_BYTES[tensor.dtype]:
        return f"has {chunk.nbytes} bytes for {math.prod(chunk.sizes)} elements of {tensor.dtype}"
    if chunk.offset != ends.get(chunk.file, file.header_bytes) or chunk.offset + chunk.nbytes > file.size_bytes:
        return f"at byte {chunk.offset} overlaps another or lies outside {file.name}"
    if len(chunk.digests) != DIGEST_BYTES * block_count(chunk.nbytes):
        return f"has {len(chunk.digests) // DIGEST_BYTES} block checksums for {-(-chunk.nbytes // BLOCK_BYTES)} blocks"
    return ""
