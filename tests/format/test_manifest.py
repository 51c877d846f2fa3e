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
from engine.format.manifest import (
    _ENVELOPE,
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    PAGE_CHUNKS,
    SMALL_PAGE,
    Chunk,
    FileEntry,
    IndexEntry,
    IndexHead,
    Line,
    Manifest,
    RankIndex,
    Summary,
    encode_index,
    encode_manifest,
    index_name,
    open_index,
    read_manifest,
    read_page,
    read_summary,
    shard_name,
)
from tests.layouts import Bytes

SUMMARY = Summary(
    engine="single",
    world_size=2,
    epoch=1,
    step=10,
    samples=320,
    created=1.5,
    attempt=".step_00000010.ab",
    lineage=(Line("a", 0), Line("b", 7)),
    metrics={"loss": float("inf")},
    monitor="loss",
    mode="min",
    best_step=10,
    tensors=2,
    size_bytes=5000,
)
TENSORS = (
    LogicalTensor("model.weight", "F32", (6, 4), (Part(Absent(), (0, 0), (2, 4)), Part(Flat(Mesh((2,)), 3, 16), (2, 0), (4, 4), "BF16"))),
    LogicalTensor("model.bias", "BF16", (), (Part(Grid(Mesh((2, 2), 1, (4, 2)), (REPLICATED, 0), 1)),)),
    LogicalTensor("model.odd", "BF16", (3,), (Part(Grid(Mesh((3,), ranks=(5, 0, 2)), (0,), 0)),)),
)
MANIFEST = Manifest(SUMMARY, TENSORS, {"a": "b"}, (IndexEntry(7, b"x" * 16), IndexEntry(8, b"y" * 16, "frozen.0.index")), b"\x00\xff")
INDEX = RankIndex(
    1,
    (FileEntry("rank_00001.0.safetensors", 5000, 4096, b"h" * 16),),
    (Chunk(0, (2, 0), (4, 4), 0, 4096, 64, b"d" * 16), Chunk(0, (6, 0), (1, 4), 0, 4160, 16, b"e" * 16), Chunk(1, (), (), 0, 4176, 2, b"f" * 16)),
    b"\x01record",
)


def read_index(data: bytes, where: str = "here") -> RankIndex:
    head, sealed = open_index(Bytes(data), where)
    sealed.body()
    chunks = tuple(chunk for page in head.pages for chunk in read_page(sealed, page, where))
    return RankIndex(head.rank, head.files, chunks, sealed.page(head.record))


def read_root(data: bytes, where: str = "here") -> Manifest:
    return read_manifest(Bytes(data), where)[0]


FILES = {"manifest": (encode_manifest(MANIFEST), read_root, MANIFEST), "index": (encode_index(INDEX)[0], read_index, INDEX)}
BOTH = pytest.mark.parametrize(("data", "read", "value"), FILES.values(), ids=FILES)


def sealed(head: bytes, body: bytes = b"", kind: int = 1, version: int = 1) -> bytes:
    return _ENVELOPE.pack(b"lockstep", version, kind, len(head), len(body), digest(head), digest(body)) + head + body


def parts(data: bytes) -> tuple[bytes, bytes]:
    head_bytes = _ENVELOPE.unpack_from(data)[3]
    return data[_ENVELOPE.size : _ENVELOPE.size + head_bytes], data[_ENVELOPE.size + head_bytes :]


@BOTH
def test_what_is_encoded_is_decoded(data, read, value):
    assert read(data) == value


def test_a_listing_reads_the_head_only():
    reader = Bytes(encode_manifest(msgspec.structs.replace(MANIFEST, record=b"r" * 100_000)))
    assert read_summary(reader, "here") == SUMMARY
    assert reader.bytes_read <= 4096


@BOTH
def test_a_flip_of_any_bit_of_any_byte_is_refused_by_name(data, read, value):
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(CheckpointCorrupt, match="runs/a/manifest"):
                read(bytes(broken), "runs/a/manifest")


def test_a_flip_of_any_byte_of_an_index_outside_a_page_that_is_read_is_seen_when_it_is():
    """Pages carry their own digests: a reader of one page need not read the others."""
    data = FILES["index"][0]
    head, found = open_index(Bytes(data), "here")
    (page,) = head.pages
    for position in range(found.body_at, len(data)):
        broken = bytearray(data)
        broken[position] ^= 1
        _, again = open_index(Bytes(bytes(broken)), "here")
        inside = position - found.body_at < page.size_bytes
        with pytest.raises(CheckpointCorrupt, match="page"):
            again.page(page if inside else head.record)
        again.page(head.record if inside else page)


@BOTH
def test_every_truncation_and_every_addition_is_refused_by_name(data, read, value):
    for broken in [*(data[:n] for n in range(len(data))), data + b"\0", data + data]:
        with pytest.raises(CheckpointCorrupt, match="runs/a/manifest"):
            read(broken, "runs/a/manifest")


def test_the_digest_that_a_manifest_has_of_an_index_covers_its_every_byte():
    data, entry = encode_index(INDEX)
    assert entry.size_bytes == len(data)
    _, found = open_index(Bytes(data), "here")
    assert found.digest == entry.digest
    other, changed = encode_index(msgspec.structs.replace(INDEX, record=b"\x02record"))
    assert len(other) == len(data)
    assert changed.digest != entry.digest, "the head has the digests of the body"


def test_swapped_kinds_are_refused():
    with pytest.raises(CheckpointCorrupt, match="kind 2, 1 expected"):
        read_root(FILES["index"][0])
    with pytest.raises(CheckpointCorrupt, match="kind 1, 2 expected"):
        read_index(FILES["manifest"][0])


def test_a_head_with_the_body_of_another_is_refused():
    other = encode_manifest(msgspec.structs.replace(MANIFEST, record=b"\x00\xfe"))
    (head, _), (_, body) = parts(FILES["manifest"][0]), parts(other)
    with pytest.raises(CheckpointCorrupt, match="its checksum does not match"):
        read_root(FILES["manifest"][0][: _ENVELOPE.size] + head + body)


def test_a_later_format_says_to_upgrade():
    head, body = parts(FILES["manifest"][0])
    with pytest.raises(CheckpointCorrupt, match=r"format 7; this version reads up to 1\. Upgrade"):
        read_root(sealed(head, body, version=7))


def test_a_foreign_file_is_told_by_its_first_bytes():
    with pytest.raises(CheckpointCorrupt, match=r"not a lockstep file: it starts with b'PK"):
        read_root(b"PK\x03\x04" + b"\0" * 100)


class Announced:
    """A sparse file: as large as its envelope says, and nothing may read more than the envelope of it."""

    def __init__(self, head_bytes: int, body_bytes: int) -> None:
        self._start = _ENVELOPE.pack(b"lockstep", 1, 1, head_bytes, body_bytes, bytes(16), bytes(16))
        self.size_bytes = _ENVELOPE.size + head_bytes + body_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        assert offset + len(target) <= 4096
        target[: _ENVELOPE.size] = self._start


@pytest.mark.parametrize(
    ("head_bytes", "body_bytes"), [(100, 4 * 10**12), (100, MAX_BODY_BYTES + 1), (MAX_HEAD_BYTES + 1, 0), (2**32 - 1, 2**64 - 1)]
)
def test_an_announced_terabyte_is_refused_before_anything_is_allocated(head_bytes, body_bytes):
    tracemalloc.start()
    with pytest.raises(CheckpointCorrupt, match="announces"):
        read_manifest(Announced(head_bytes, body_bytes), "here")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def _indexes(tensors: int, boxes: int = 1) -> RankIndex:
    chunks = [Chunk(t, (b,), (1,), 0, 4096 + 4 * (t * boxes + b), 4, b"d" * 16) for t in range(tensors) for b in range(boxes)]
    return RankIndex(0, (), tuple(reversed(chunks)), b"")


def _pages(index: RankIndex, classes=()) -> list[list[Chunk]]:
    head, found = open_index(Bytes(encode_index(index, classes)[0]), "here")
    pages = [read_page(found, page, "here") for page in head.pages]
    assert [page.first_tensor for page in head.pages] == [page[0].tensor for page in pages]
    ends = [page.offset + page.size_bytes for page in (*head.pages, head.record)]
    assert [page.offset for page in (*head.pages, head.record)] == [0, *ends[:-1]], "pages lie one after the other, the record last"
    assert ends[-1] == found.body_bytes
    return pages


@given(st.integers(1, 2000), st.integers(1, 3), st.integers(0, 60))
def test_pages_have_all_chunks_in_order_and_never_part_a_tensor(tensors, boxes, extent):
    """``extent``: how many tensors have the same geometry."""
    index = _indexes(tensors, boxes)
    pages = _pages(index, [t // extent for t in range(tensors)] if extent else ())
    assert [chunk for page in pages for chunk in page] == sorted(index.chunks, key=lambda c: (c.tensor, c.offsets))
    held = [{chunk.tensor for chunk in page} for page in pages]
    assert sum(map(len, held)) == tensors, "a tensor is in two pages"
    assert all(len(page) <= PAGE_CHUNKS + boxes for page in pages)
    if not extent:
        assert len(pages) == -(-tensors // -(-PAGE_CHUNKS // boxes))


def test_a_page_ends_where_the_geometry_changes_if_it_is_worth_a_page():
    assert [len(page) for page in _pages(_indexes(60), [0] * 20 + [1] * 5 + [2] * 35)] == [20, 40]
    assert SMALL_PAGE == 16, "20 chunks are enough, 5 are not"


def test_a_page_with_another_number_of_chunks_than_its_head_says_is_refused():
    head, body = parts(FILES["index"][0])
    lying = msgspec.msgpack.decode(head, type=IndexHead)
    lying = msgspec.structs.replace(lying, pages=(msgspec.structs.replace(lying.pages[0], chunks=2**40),))
    with pytest.raises(CheckpointCorrupt, match=f"a page has 3 chunks, {2**40} expected"):
        read_index(sealed(msgspec.msgpack.encode(lying), body, kind=2))


@pytest.mark.parametrize("change", [{"offset": -1}, {"offset": 2**63}, {"size_bytes": -1}, {"size_bytes": 2**63}, {"offset": 2**64 - 1}])
def test_a_page_outside_its_file_is_refused(change):
    head, body = parts(FILES["index"][0])
    lying = msgspec.msgpack.decode(head, type=IndexHead)
    lying = msgspec.structs.replace(lying, pages=(msgspec.structs.replace(lying.pages[0], **change),))
    with pytest.raises(CheckpointCorrupt, match="its head refers to bytes"):
        read_index(sealed(msgspec.msgpack.encode(lying), body, kind=2))


@pytest.mark.parametrize(
    "change",
    [
        {"created": float("nan")}, {"created": float("inf")}, {"created": -1.0}, {"created": 1e300}, {"step": -1}, {"step": 2**63}, {"epoch": -3},
        {"samples": -1}, {"lineage": ()}, {"lineage": (Line("a", -1),)}, {"size_bytes": -1}, {"tensors": -1}, {"world_size": -1},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_in_a_summary_that_none_can_have_are_refused(change):
    """What a listing prints and computes with."""
    data = encode_manifest(msgspec.structs.replace(MANIFEST, summary=msgspec.structs.replace(SUMMARY, **change)))
    with pytest.raises(CheckpointCorrupt, match="here does not follow the format"):
        read_summary(Bytes(data), "here")


def test_the_envelope_is_as_documented():
    """Magic, format, kind, head bytes, body bytes, head digest, body digest; little-endian, 56 bytes."""
    for kind, (data, *_) in enumerate(FILES.values(), 1):
        head, body = parts(data)
        assert _ENVELOPE.size == 56
        assert data[:8] == b"lockstep"
        assert struct.unpack("<HHIQ", data[8:24]) == (1, kind, len(head), len(body))
        assert data[24:40] == digest(head)
        assert data[40:56] == digest(body)


def test_the_parts_are_as_documented():
    """docs/format.md, field by field: what another reader would rely on."""
    head, body = map(msgspec.msgpack.decode, parts(FILES["manifest"][0]))
    assert list(head) == list(Summary.__struct_fields__)
    assert head["lineage"] == [["a", 0], ["b", 7]]
    assert list(body) == ["tensors", "aliases", "indexes", "record"]
    assert body["tensors"] == [
        ["model.weight", "F32", [6, 4], [[["absent", 0.0], [0, 0], [2, 4], ""], [["flat", [[2], 0, [], []], 3, 16], [2, 0], [4, 4], "BF16"]]],
        ["model.bias", "BF16", [], [[["grid", [[2, 2], 1, [4, 2], []], [-1, 0], 1], [], [], ""]]],
        ["model.odd", "BF16", [3], [[["grid", [[3], 0, [], [5, 0, 2]], [0], 0], [], [], ""]]],
    ]
    assert body["indexes"] == [[7, b"x" * 16, ""], [8, b"y" * 16, "frozen.0.index"]]
    head, body = parts(FILES["index"][0])
    head = msgspec.msgpack.decode(head)
    assert list(head) == ["rank", "files", "pages", "record"]
    assert head["files"] == [["rank_00001.0.safetensors", 5000, 4096, b"h" * 16]]
    ((first, chunks, offset, size_bytes, page_digest),) = head["pages"]
    assert (first, chunks, offset, page_digest) == (0, 3, 0, digest(body[:size_bytes]))
    assert msgspec.msgpack.decode(body[:size_bytes])[0] == [0, [2, 0], [4, 4], 0, 4096, 64, b"d" * 16]
    assert head["record"] == [0, 0, size_bytes, 7, digest(INDEX.record)]


def test_file_names():
    assert (index_name(3), shard_name(3, 1), index_name(123456)) == ("rank_00003.index", "rank_00003.1.safetensors", "rank_123456.index")
