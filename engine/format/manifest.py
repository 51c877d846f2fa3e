"""The root manifest of a step and the index of each rank: a checksummed envelope of a small head and a body, in msgpack.

Listings read heads only; a load reads the whole manifest, and of an index the head and the pages it needs.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine.errors import CheckpointCorrupt
from engine.format.checksum import DIGEST_BYTES, digest
from engine.format.layout import Dims, LogicalTensor

FORMAT = 1
_OLDEST = 1
MANIFEST = "manifest"
MAX_HEAD_BYTES = 1 << 26
MAX_BODY_BYTES = 1 << 30
PAGE_CHUNKS = 512
"""From this many chunks on an index page ends; also where tensors of another geometry begin, from :data:`SMALL_PAGE` chunks on."""
SMALL_PAGE = 16

_MAGIC = b"lockstep"
_ENVELOPE = struct.Struct(f"<8sHHIQ{DIGEST_BYTES}s{DIGEST_BYTES}s")  # magic, format, kind, head and body bytes, head and body digest
_KINDS = {"manifest": 1, "index": 2}

Count = Annotated[int, Meta(ge=0, le=2**62)]
StepNumber = Annotated[int, Meta(ge=0, lt=10**18)]  # as many digits as the names of steps have
_Time = Annotated[float, Meta(ge=0, le=253402300799)]  # up to the year 9999; no NaN


class Line(Struct, frozen=True, array_like=True, gc=False):
    """A line of training: its name, unique in the run, and the step that it went on from (0 for a fresh start)."""

    name: str
    parent_step: StepNumber


class Summary(Struct, frozen=True, gc=False):
    """The head of a manifest: what listings and the catalog need. ``lineage`` is the step's own line last, those it descends from before.

    ``best_step`` is the step with the best ``monitor`` so far on this line, itself included; -1 where nothing is monitored.
    ``size_bytes`` counts shard and index files, ``tensors`` logical tensors.
    """

    engine: str
    world_size: Count
    epoch: Count
    step: StepNumber
    samples: Count
    created: _Time
    attempt: str
    lineage: Annotated[tuple[Line, ...], Meta(min_length=1)]
    metrics: dict[str, float]
    monitor: str
    mode: Annotated[str, Meta(pattern=r"^(min|max|)\Z")]
    best_step: Annotated[int, Meta(ge=-1, lt=10**18)]
    tensors: Count
    size_bytes: Count


class IndexEntry(Struct, frozen=True, array_like=True, gc=False):
    """An index file, as the manifest knows it: its size, the digest of its envelope and head, and its name; none where that is
    :func:`index_name`. The first ``world_size`` entries are the ranks'; further ones are of what does not change, see
    :func:`frozen_index_name`."""

    size_bytes: int
    digest: bytes
    name: str = ""


class _Body(Struct, frozen=True, gc=False):
    tensors: tuple[LogicalTensor, ...]
    aliases: dict[str, str]
    indexes: tuple[IndexEntry, ...]
    record: bytes


class Manifest(Struct, frozen=True, gc=False):
    """What a step holds. ``record`` is the typed record shared by all ranks; ``tensors`` are in the order chunks refer to."""

    summary: Summary
    tensors: tuple[LogicalTensor, ...]
    aliases: dict[str, str]
    indexes: tuple[IndexEntry, ...]
    record: bytes

    def index_name(self, writer: int) -> str:
        """The file of an index: a rank's, or a further writer's, of what does not change."""
        return self.indexes[writer].name or index_name(writer)


class FileEntry(Struct, frozen=True, array_like=True, gc=False):
    """One shard file of a rank. ``header_bytes`` counts the 8 length bytes and the JSON with its padding."""

    name: str
    size_bytes: int
    header_bytes: int
    header_digest: bytes


class Chunk(Struct, frozen=True, array_like=True, gc=False):
    """One box of one tensor: ``nbytes`` at ``offset`` of file ``file``; ``digests`` holds 16 bytes a block."""

    tensor: int
    offsets: Dims
    sizes: Dims
    file: int
    offset: int
    nbytes: int
    digests: bytes


class Page(Struct, frozen=True, array_like=True, gc=False):
    """A run of an index's chunks, ordered by tensor; no tensor is in two pages. ``offset`` counts from the body's start."""

    first_tensor: int
    chunks: int
    offset: int
    size_bytes: int
    digest: bytes


class IndexHead(Struct, frozen=True, gc=False):
    """The head of a rank's index. ``record`` is a page without chunks: the rank's own typed record (its random state)."""

    rank: int
    files: tuple[FileEntry, ...]
    pages: tuple[Page, ...]
    record: Page


class RankIndex(Struct, frozen=True, gc=False):
    """A whole index: what one rank wrote."""

    rank: int
    files: tuple[FileEntry, ...]
    chunks: tuple[Chunk, ...]
    record: bytes


def index_name(rank: int) -> str:
    return f"rank_{rank:05d}.index"


def shard_name(rank: int, number: int) -> str:
    return f"rank_{rank:05d}.{number}.safetensors"


def frozen_name(header_digest: bytes, block_digests: Iterable[bytes]) -> str:
    """A file of content that does not change is named for it, whoever wrote it: of two with one name, one will do."""
    return f"frozen.{digest(header_digest + b''.join(block_digests)).hex()}.safetensors"


def frozen_index_name(entry_digest: bytes) -> str:
    return f"frozen.{entry_digest.hex()}.index"


def encode_manifest(manifest: Manifest) -> bytes:
    body = _Body(manifest.tensors, manifest.aliases, manifest.indexes, manifest.record)
    return _seal("manifest", msgspec.msgpack.encode(manifest.summary), msgspec.msgpack.encode(body))


def encode_index(index: RankIndex, classes: Sequence[int] = ()) -> tuple[bytes, IndexEntry]:
    """The file, and how the manifest refers to it. ``classes``: the geometry class of each tensor, by number (see ``engine.plan.order``):
    pages end where it changes, so that a reader from another sharding finds what it needs in few of them."""
    pages, body = [], bytearray()
    for group in _pages(sorted(index.chunks, key=lambda c: (c.tensor, c.offsets)), classes):
        data = msgspec.msgpack.encode(group)
        pages.append(Page(group[0].tensor, len(group), len(body), len(data), digest(data)))
        body += data
    record = Page(0, 0, len(body), len(index.record), digest(index.record))
    body += index.record
    head = msgspec.msgpack.encode(IndexHead(index.rank, index.files, tuple(pages), record))
    data = _seal("index", head, bytes(body))
    return data, IndexEntry(len(data), digest(data[: _ENVELOPE.size + len(head)]))


def _pages(chunks: Sequence[Chunk], classes: Sequence[int]) -> list[list[Chunk]]:
    pages: list[list[Chunk]] = []
    for chunk in chunks:
        last = pages[-1][-1].tensor if pages else -1
        if chunk.tensor != last:
            other = bool(classes) and bool(pages) and classes[chunk.tensor] != classes[last]
            if not pages or len(pages[-1]) >= (SMALL_PAGE if other else PAGE_CHUNKS):
                pages.append([])
        pages[-1].append(chunk)
    return pages


def _seal(kind: str, head: bytes, body: bytes) -> bytes:
    return _ENVELOPE.pack(_MAGIC, FORMAT, _KINDS[kind], len(head), len(body), digest(head), digest(body)) + head + body


class _Reader(Protocol):
    size_bytes: int

    def read_into(self, offset: int, target: memoryview) -> None: ...


T = TypeVar("T")


class Sealed:
    """An envelope that is being read: its head is verified when this is made, its body when it is asked for.

    Raises :class:`CheckpointCorrupt` naming ``where`` for anything that is not exactly one sound envelope of that kind.
    """

    def __init__(self, reader: _Reader, kind: str, where: str) -> None:
        self._reader = reader
        self._where = where
        if reader.size_bytes < _ENVELOPE.size:
            raise CheckpointCorrupt(f"{where} is truncated: {reader.size_bytes} bytes, at least {_ENVELOPE.size} expected")
        raw = self._read(0, min(reader.size_bytes, 4096))  # most often the whole head
        magic, version, number, head_bytes, body_bytes, head_digest, self._body_digest = _ENVELOPE.unpack_from(raw)
        if magic != _MAGIC:
            raise CheckpointCorrupt(f"{where} is not a lockstep file: it starts with {bytes(magic)!r}")
        if version > FORMAT:
            raise CheckpointCorrupt(f"{where} has format {version}; this version reads up to {FORMAT}. Upgrade lockstep")
        if version < _OLDEST:
            raise CheckpointCorrupt(f"{where} has format {version}, which was unstable and is not read any more; formats from {_OLDEST} on are")
        if number != _KINDS[kind]:
            raise CheckpointCorrupt(f"{where} is of kind {number}, {_KINDS[kind]} expected: files have been swapped")
        if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES:
            raise CheckpointCorrupt(f"{where} announces {head_bytes} + {body_bytes} bytes; at most {MAX_HEAD_BYTES} + {MAX_BODY_BYTES} are read")
        self.body_at, self.body_bytes = _ENVELOPE.size + head_bytes, body_bytes
        if reader.size_bytes != self.body_at + body_bytes:
            raise CheckpointCorrupt(
                f"{where} is truncated or has bytes added: {reader.size_bytes} bytes, {self.body_at + body_bytes} expected by its envelope"
            )
        raw = bytes(raw[: self.body_at] if len(raw) >= self.body_at else raw + self._read(len(raw), self.body_at - len(raw)))
        self.head = raw[_ENVELOPE.size :]
        if digest(self.head) != head_digest:
            raise CheckpointCorrupt(f"{where}: its head's checksum does not match: bytes have changed since it was written")
        self.digest = digest(raw)
        """Of envelope and head, and so, by the digests in them, of all."""
        self.bytes_read = len(raw)

    def body(self) -> bytearray:
        data = self.part(0, self.body_bytes)
        if digest(data) != self._body_digest:
            raise CheckpointCorrupt(f"{self._where}: its checksum does not match: bytes have changed since it was written")
        return data

    def part(self, offset: int, size_bytes: int) -> bytearray:
        """Of the body, unverified."""
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.body_bytes:
            raise CheckpointCorrupt(f"{self._where}: its head refers to bytes {offset} to {offset + size_bytes} of {self.body_bytes}")
        self.bytes_read += size_bytes
        return self._read(self.body_at + offset, size_bytes)

    def page(self, page: Page) -> bytes:
        data = self.part(page.offset, page.size_bytes)
        if digest(data) != page.digest:
            raise CheckpointCorrupt(
                f"{self._where}: the checksum of its page at {page.offset} does not match: bytes have changed since it was written"
            )
        return bytes(data)

    def _read(self, offset: int, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        self._reader.read_into(offset, memoryview(data))
        return data


def decode_part(data: bytes | bytearray, kind: type[T], where: str) -> T:
    try:
        value: Any = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:  # ValueError: text that is not UTF-8
        raise CheckpointCorrupt(f"{where} does not follow the format: {e}") from e
    return value


def read_summary(reader: _Reader, where: str) -> Summary:
    """The head of a manifest; the body is not read."""
    return decode_part(Sealed(reader, "manifest", where).head, Summary, where)


def read_manifest(reader: _Reader, where: str) -> tuple[Manifest, bytes]:
    """The manifest and its digest."""
    sealed = Sealed(reader, "manifest", where)
    summary, body = decode_part(sealed.head, Summary, where), decode_part(sealed.body(), _Body, where)
    return Manifest(summary, body.tensors, body.aliases, body.indexes, body.record), sealed.digest


def open_index(reader: _Reader, where: str) -> tuple[IndexHead, Sealed]:
    sealed = Sealed(reader, "index", where)
    return decode_part(sealed.head, IndexHead, where), sealed


def read_page(sealed: Sealed, page: Page, where: str) -> list[Chunk]:
    chunks = decode_part(sealed.page(page), list[Chunk], where)
    if len(chunks) != page.chunks:
        raise CheckpointCorrupt(f"{where}: a page has {len(chunks)} chunks, {page.chunks} expected")
    return chunks
