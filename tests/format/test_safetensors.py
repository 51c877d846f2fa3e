"""Our headers are plain safetensors, padded, with DCP's sharding info. tests/plan/test_image.py opens them with the real package."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.format.safetensors import HEADER_ALIGN_BYTES, Entry, as_stored, decode_header, encode_header

ENTRIES = [Entry("model.a", "F32", (2, 0), (3, 4), 0, 48), Entry("modèle.ß", "BF16", (), (), 48, 2), Entry("e", "I64", (0, 0), (0, 5), 50, 0)]


def decoded(entries: list[Entry]) -> tuple[dict, dict]:
    """The header's entries, and the offsets that DCP reads."""
    header = json.loads(encode_header(entries)[8:])
    return header, json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])


def test_a_header_says_what_lies_where():
    header, offsets = decoded(ENTRIES)
    assert header == {
        "model.a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "modèle.ß": {"dtype": "BF16", "shape": [], "data_offsets": [48, 50]},
        "e": {"dtype": "I64", "shape": [0, 5], "data_offsets": [50, 50]},
    }
    assert {name: info["saved_offsets"] for name, info in offsets.items()} == {"model.a": [2, 0], "modèle.ß": [], "e": [0, 0]}


@given(st.integers(0, 200))
def test_data_starts_aligned_and_the_length_word_is_right(count):
    header = encode_header([Entry(f"t{i}", "F32", (0,), (1,), 4 * i, 4) for i in range(count)])
    assert len(header) % HEADER_ALIGN_BYTES == 0
    assert struct.unpack("<Q", header[:8]) == (len(header) - 8,)
    assert header[8:9] == b"{"


@pytest.mark.parametrize(("dtype", "width"), [("C128", 16), ("F8_E8M0", 1)])
def test_types_without_a_name_there_are_stored_as_bytes(dtype, width):
    header, offsets = decoded([Entry("m", dtype, (2, 3), (4, 5), 0, 20 * width), Entry("s", dtype, (), (), 20 * width, width)])
    assert (header["m"]["dtype"], header["m"]["shape"], offsets["m"]["saved_offsets"]) == ("U8", [4, 5 * width], [2, 3 * width])
    assert (header["s"]["dtype"], header["s"]["shape"], offsets["s"]["saved_offsets"]) == ("U8", [width], [0])


def test_what_is_encoded_is_decoded():
    """As the file has it: types that have no name there as bytes. tests/transfer/test_fuzz.py has what is refused."""
    entries = [*ENTRIES, Entry("c", "C128", (3, 2), (1, 2), 50, 32), Entry("s", "F8_E8M0", (), (), 82, 1)]
    assert decode_header(encode_header(entries), "here") == [as_stored(entry) for entry in entries]
    assert as_stored(entries[3]) == Entry("c", "U8", (3, 32), (1, 32), 50, 32)
    assert as_stored(entries[4]) == Entry("s", "U8", (0,), (1,), 82, 1)


def test_metadata_is_text_only():
    metadata = json.loads(encode_header(ENTRIES)[8:])["__metadata__"]
    assert set(map(type, metadata.values())) == {str}, "safetensors allows nothing else in __metadata__"
