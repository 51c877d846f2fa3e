"""The envelope refuses whatever is not exactly one sound file of its kind, whoever made it."""

import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointCorrupt
from engine.format.checksum import digest
from engine.format.layout import REPLICATED, Absent, Flat, Grid, LogicalTensor, Mesh, Part
from engine.format.manifest import _ENVELOPE, Chunk, FileEntry, IndexEntry, Manifest, RankIndex, decode, encode, index_name, shard_name

TENSORS = (
    LogicalTensor("model.weight", "F32", (6, 4), (Part(Absent(), (0, 0), (2, 4)), Part(Flat(Mesh((2,)), 3, 16), (2, 0), (4, 4)))),
    LogicalTensor("model.bias", "BF16", (), (Part(Grid(Mesh((2, 2), (3, 1, 0, 2)), (REPLICATED, 0), 1)),)),
)
MANIFEST = Manifest(
    format=0,
    engine="single",
    world_size=2,
    epoch=1,
    step=10,
    samples=320,
    created=1.5,
    attempt=".step_00000010.ab",
    parent="",
    metrics={"loss": float("inf")},
    tensors=TENSORS,
    aliases={"a": "b"},
    indexes=(IndexEntry(7, b"x" * 16), IndexEntry(8, b"y" * 16)),
    record=b"\x00\xff",
)
INDEX = RankIndex(1, (FileEntry("rank_00001.0.safetensors", 5000, 4096, b"h" * 16),), (Chunk(0, (2, 0), (4, 4), 0, 4096, 64, b"d" * 16),), b"")
BOTH = pytest.mark.parametrize("value", [MANIFEST, INDEX], ids=["manifest", "index"])


def _envelope(payload: bytes, kind: int = 1, version: int = 0) -> bytes:
    return _ENVELOPE.pack(b"lockstep", version, kind, 0, len(payload), digest(payload)) + payload


@BOTH
def test_what_is_encoded_is_decoded(value):
    assert decode(encode(value), type(value), "here") == value


@BOTH
def test_a_flip_of_any_bit_of_any_byte_is_refused_by_name(value):
    data = encode(value)
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(CheckpointCorrupt, match="runs/a/manifest"):
                decode(bytes(broken), type(value), "runs/a/manifest")


@BOTH
def test_every_truncation_and_every_addition_is_refused_by_name(value):
    data = encode(value)
    for broken in [*(data[:n] for n in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(CheckpointCorrupt, match="runs/a/manifest"):
            decode(broken, type(value), "runs/a/manifest")


def test_swapped_kinds_are_refused():
    with pytest.raises(CheckpointCorrupt, match="kind 2, 1 expected"):
        decode(encode(INDEX), Manifest, "here")
    with pytest.raises(CheckpointCorrupt, match="kind 1, 2 expected"):
        decode(encode(MANIFEST), RankIndex, "here")


def test_a_later_format_says_to_upgrade():
    with pytest.raises(CheckpointCorrupt, match=r"format 7; this version reads up to 0\. Upgrade"):
        decode(_envelope(encode(MANIFEST)[_ENVELOPE.size :], version=7), Manifest, "here")


def test_a_foreign_file_is_told_by_its_first_bytes():
    with pytest.raises(CheckpointCorrupt, match=r"not a lockstep file: it starts with b'PK"):
        decode(b"PK\x03\x04" + b"\0" * 100, Manifest, "here")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_corrupt_and_nothing_else(data):
    for kind in (Manifest, RankIndex):
        with pytest.raises(CheckpointCorrupt):
            decode(data, kind, "here")


@given(st.binary(max_size=200))
def test_arbitrary_payloads_under_a_sound_checksum_are_corrupt_and_nothing_else(payload):
    for number, kind in ((1, Manifest), (2, RankIndex)):
        with pytest.raises(CheckpointCorrupt):
            decode(_envelope(payload, number), kind, "here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@BOTH
@given(data=st.data())
def test_a_field_of_another_type_is_corrupt_or_decodes_to_the_declared_type(value, data):
    fields = msgspec.to_builtins(value, builtin_types=(bytes,))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(_JSON)
    payload = msgspec.msgpack.encode(fields)
    try:
        decoded = decode(_envelope(payload, 1 if value is MANIFEST else 2), type(value), "here")
    except CheckpointCorrupt:
        return
    assert decode(encode(decoded), type(value), "here") == decoded or "nan" in repr(decoded)


def test_text_that_is_not_utf8_is_corrupt():
    payload = encode(MANIFEST)[_ENVELOPE.size :].replace(b"single", b"sing\xff\xfe")
    with pytest.raises(CheckpointCorrupt, match="here does not follow the format"):
        decode(_envelope(payload), Manifest, "here")


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"], ids=["array", "map", "bytes", "text"])
def test_a_huge_declared_length_allocates_nothing(head):
    tracemalloc.start()
    for payload in (b"\x81\xa7tensors" + head + b"\xff" * 4, b"\x81\xa5files" + head + b"\xff" * 4, b"\x81\xa6record" + head + b"\xff" * 4):
        for kind in (Manifest, RankIndex):
            with pytest.raises(CheckpointCorrupt):
                decode(_envelope(payload, 1 if kind is Manifest else 2), kind, "here")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_deep_nesting_is_corrupt():
    payload = b"\x81\xa7tensors" + b"\x91" * 100_000 + b"\x90"
    with pytest.raises(CheckpointCorrupt):
        decode(_envelope(payload), Manifest, "here")


def test_the_head_is_as_documented():
    """Magic, format, kind, zero, payload length, digest; little-endian, 40 bytes."""
    data = encode(MANIFEST)
    assert _ENVELOPE.size == 40
    assert data[:8] == b"lockstep"
    assert struct.unpack("<HHIQ", data[8:24]) == (0, 1, 0, len(data) - 40)
    assert data[24:40] == digest(data[40:])


def test_file_names():
    assert (index_name(3), shard_name(3, 1), index_name(123456)) == ("rank_00003.index", "rank_00003.1.safetensors", "rank_123456.index")
