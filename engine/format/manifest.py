"""The root manifest of a step and the index of each rank: msgpack in a checksummed envelope."""

import struct
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from engine.errors import CheckpointCorrupt
from engine.format.checksum import DIGEST_BYTES, digest
from engine.format.layout import LogicalTensor

FORMAT = 0
MANIFEST = "manifest"
MAX_ENVELOPE_BYTES = 1 << 30

_MAGIC = b"lockstep"
_ENVELOPE = struct.Struct(f"<8sHHIQ{DIGEST_BYTES}s")  # magic, format, kind, zero, payload bytes, payload digest
_KINDS = {"manifest": 1, "index": 2}


class IndexEntry(Struct, frozen=True, array_like=True, gc=False):
    """A rank's index file, as the manifest knows it."""

    size_bytes: int
    digest: bytes


class Manifest(Struct, frozen=True, gc=False):
    """What a step holds. ``record`` is the typed record shared by all ranks; ``tensors`` are in the order chunks refer to."""

    format: int
    engine: str
    world_size: int
    epoch: int
    step: int
    samples: int
    created: float
    attempt: str
    parent: str
    metrics: dict[str, float]
    tensors: tuple[LogicalTensor, ...]
    aliases: dict[str, str]
    indexes: tuple[IndexEntry, ...]
    record: bytes


class FileEntry(Struct, frozen=True, array_like=True, gc=False):
    """One shard file of a rank. ``header_bytes`` counts the 8 length bytes and the JSON with its padding."""

    name: str
    size_bytes: int
    header_bytes: int
    header_digest: bytes


class Chunk(Struct, frozen=True, array_like=True, gc=False):
    """One box of one tensor: ``nbytes`` at ``offset`` of file ``file``; ``digests`` holds 16 bytes a block."""

    tensor: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    offset: int
    nbytes: int
    digests: bytes


class RankIndex(Struct, frozen=True, gc=False):
    """What one rank wrote. ``record`` is its own typed record (RNG state)."""

    rank: int
    files: tuple[FileEntry, ...]
    chunks: tuple[Chunk, ...]
    record: bytes


def index_name(rank: int) -> str:
    return f"rank_{rank:05d}.index"


def shard_name(rank: int, number: int) -> str:
    return f"rank_{rank:05d}.{number}.safetensors"


def encode(value: Manifest | RankIndex) -> bytes:
    payload = msgspec.msgpack.encode(value)
    kind = _KINDS["manifest" if isinstance(value, Manifest) else "index"]
    return _ENVELOPE.pack(_MAGIC, FORMAT, kind, 0, len(payload), digest(payload)) + payload


T = TypeVar("T", Manifest, RankIndex)


def decode(data: bytes, kind: type[T], where: str) -> T:
    """Raises :class:`CheckpointCorrupt` naming ``where`` for anything that is not exactly one sound envelope of that kind."""
    if len(data) < _ENVELOPE.size:
        raise CheckpointCorrupt(f"{where} is truncated: {len(data)} bytes, at least {_ENVELOPE.size} expected")
    magic, version, number, zero, size_bytes, stored = _ENVELOPE.unpack_from(data)
    if magic != _MAGIC:
        raise CheckpointCorrupt(f"{where} is not a lockstep file: it starts with {bytes(magic)!r}")
    if version > FORMAT:
        raise CheckpointCorrupt(f"{where} has format {version}; this version reads up to {FORMAT}. Upgrade lockstep")
    if zero:
        raise CheckpointCorrupt(f"{where}: its head has changed: {zero} where 0 is expected")
    payload = data[_ENVELOPE.size :]
    if len(payload) != size_bytes:
        raise CheckpointCorrupt(f"{where} is truncated or has bytes added: {len(payload)} bytes after its head, {size_bytes} expected")
    if digest(payload) != stored:
        raise CheckpointCorrupt(f"{where}: its checksum does not match: bytes have changed since it was written")
    expected = _KINDS["manifest" if kind is Manifest else "index"]
    if number != expected:
        raise CheckpointCorrupt(f"{where} is of kind {number}, {expected} expected: files have been swapped")
    return _decode_payload(payload, kind, where)


def _decode_payload(payload: bytes, kind: type[T], where: str) -> T:
    try:
        value: Any = msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:  # ValueError: text that is not UTF-8
        raise CheckpointCorrupt(f"{where} does not follow the format: {e}") from e
    return value
