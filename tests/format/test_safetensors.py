"""Our headers are plain safetensors; what is not a header is corrupt."""

import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointCorrupt
from engine.format.safetensors import HEADER_ALIGN_BYTES, Entry, decode_header, encode_header

ENTRIES = [Entry("model.a", "F32", (2, 0), (3, 4), 0, 48), Entry("modèle.ß", "BF16", (), (), 48, 2), Entry("e", "I64", (0, 0), (0, 5), 50, 0)]


def test_a_header_is_decoded_as_it_was_encoded():
    assert decode_header(encode_header(ENTRIES), "here") == {e.name: e for e in ENTRIES}


@given(st.integers(0, 200))
def test_data_starts_aligned_and_the_length_word_is_right(count):
    header = encode_header([Entry(f"t{i}", "F32", (0,), (1,), 4 * i, 4) for i in range(count)])
    assert len(header) % HEADER_ALIGN_BYTES == 0
    assert struct.unpack("<Q", header[:8]) == (len(header) - 8,)
    assert header[8:9] == b"{"


@pytest.mark.parametrize(("dtype", "width"), [("C128", 16), ("F8_E8M0", 1)])
def test_types_without_a_name_there_are_stored_as_bytes(dtype, width):
    entries = [Entry("m", dtype, (2, 3), (4, 5), 0, 20 * width), Entry("s", dtype, (), (), 20 * width, width)]
    found = decode_header(encode_header(entries), "here")
    assert found["m"] == Entry("m", "U8", (2, 3 * width), (4, 5 * width), 0, 20 * width)
    assert found["s"] == Entry("s", "U8", (0,), (width,), 20 * width, width)


def test_the_header_carries_dcps_sharding_info():
    metadata = json.loads(encode_header(ENTRIES)[8:])["__metadata__"]
    assert set(map(type, metadata.values())) == {str}, "safetensors allows text only in __metadata__"
    assert json.loads(metadata["DCP_SHARDING_INFO"])["model.a"] == {"saved_offsets": [2, 0]}


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{}", '{"__metadata__": 3}', '{"__metadata__": {"DCP_SHARDING_INFO": "[]"}, "a": {}}', "[" * 100_000, '{"a"', "\udcff"]
)
def test_what_is_not_a_header_is_corrupt(text):
    with pytest.raises(CheckpointCorrupt, match="runs/x"):
        decode_header(b"\0" * 8 + text.encode(errors="surrogateescape"), "runs/x")


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_corrupt_and_nothing_else(data):
    with pytest.raises(CheckpointCorrupt, match="runs/x"):
        decode_header(data, "runs/x")


_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(_JSON, st.sampled_from(["dtype", "shape", "data_offsets", "saved_offsets"]))
def test_a_field_of_another_type_is_corrupt_or_ignored(value, field):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    saved = {"saved_offsets": [0]}
    (saved if field == "saved_offsets" else entry)[field] = value
    text = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": saved})}, "a": entry})
    with contextlib.suppress(CheckpointCorrupt):
        decode_header(b"\0" * 8 + text.encode(), "runs/x")
