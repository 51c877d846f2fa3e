"""Whatever a step's files say under right checksums: an error of ours or an answer, soon, and without memory that no file backs."""

import contextlib
import io
import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from engine.cli import main
from engine.errors import CheckpointCorrupt, EngineError
from engine.format.checksum import digest
from engine.format.layout import REPLICATED, Absent, Flat, Grid, Mesh, Part
from engine.format.manifest import _ENVELOPE, Chunk, IndexHead, _Body, index_name
from engine.format.record import decode_record
from engine.format.safetensors import Entry, decode_header, encode_header
from engine.plan.reads import absent, wants
from engine.state.boxes import whole
from engine.storage import LocalStorage
from engine.transfer.stored import StoredCheckpoint
from engine.transfer.verify import verify
from tests.synthetic import unsynced, write_step
from tests.tiny import opened, seal_index, seal_manifest

PARTS = {
    "model.flat": (Part(Absent(), (0, 0), (2, 4)), Part(Flat(Mesh((3,)), 3, 7), (2, 0), (4, 4))),
    "model.grid": (Part(Grid(Mesh((2, 2), 0, (1, 2)), (REPLICATED, 0))),),
    "model.listed": (Part(Grid(Mesh((3,), ranks=(3, 0, 1)), (0,))),),
}
VALUES = {"model.flat": torch.ones(6, 4), "model.grid": torch.ones(5, 2).bfloat16(), "model.listed": torch.ones(4), "model.odd": torch.ones(2)}
SECONDS = 5.0


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_step(tmp_path_factory.mktemp("sound") / "run", VALUES, PARTS)


@pytest.fixture(scope="module")
def step(sound, tmp_path_factory) -> Path:
    """To be broken; whoever breaks it writes the files it breaks anew."""
    run = tmp_path_factory.mktemp("broken") / "run"
    shutil.copytree(sound.parent, run)
    return run / sound.name


def survives(step: Path, sound: Path) -> None:
    """Every reader that there is without a live model; each ends in an answer or an :class:`EngineError`."""
    began, open_files = time.monotonic(), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    with contextlib.suppress(EngineError):
        _plan_loads(StoredCheckpoint(LocalStorage(step.parent), step.name))
    for command in (
        ["ls", str(step.parent)],
        ["show", str(step)],
        ["show", "--json", str(step)],
        ["verify", str(step)],
        ["diff", str(step), str(sound)],
    ):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(command) in range(9), command
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - began < SECONDS
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert peak < 30_000_000, "the windows of eight threads, and little more"


def _plan_loads(stored: StoredCheckpoint) -> None:
    """All that a load asks of each tensor."""
    for tensor in stored.tensors.values():
        target = whole(tensor.shape)
        for rank, source, _ in wants(tensor, target):
            stored.chunk(tensor.name, source.offsets, rank)
        list(absent(tensor, target))


HOSTILE = st.one_of(
    st.sampled_from(
        [
            None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 0.5, 1e308, float("nan"),
            float("inf"), "", "model.odd", "F33", "F64", "C128", "grid", "flat", "absent", "../../x.safetensors", "x" * 5000,
            "\x1b[31m\u202e", "é.safetensors",
            b"", b"x" * 16, b"x" * 15, [], {}, [0] * 64, [1] * 65, [2] * 60, [1] * 1000, [2**60], [2**62, 2**62], [-1, -1], [[]], {"": ""},
            ["absent", 0.0], ["absent", float("nan")], ["flat", [[2**60], 0, [], []], 0, 1], ["flat", [[4], 0, [], []], 2**63, 2**63],
            ["grid", [[2] * 60, 0, [], []], [-1] * 60, 0], ["grid", [[1] * 60, 0, [], []], [0] * 60, 0], ["grid", [[4], 0, [], [0, 1, 2, 3]], [0], 0],
        ]
    ),
    st.integers(-(2**63), 2**64 - 1),
    st.lists(st.integers(-2, 8), max_size=4),
    st.binary(max_size=40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)  # fmt: skip


def _copy(value: Any) -> Any:
    """Of lists and dicts, to be changed in place."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value inside, as its container and key."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += _places(value[key])
    return found


def mutate(data: st.DataObject, value: Any) -> None:
    """One to three values replaced, removed, doubled or exchanged for others."""
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        kind = data.draw(st.sampled_from(["replace"] * 6 + ["remove", "double", "exchange"]))
        if kind == "replace":
            container[key] = _copy(data.draw(HOSTILE))
        elif kind == "remove":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.insert(key, _copy(container[key]))
        else:
            other, at = places[data.draw(st.integers(0, len(places) - 1))]
            container[key] = _copy(other[at])


@given(st.data())
def test_a_manifest_that_says_anything(sound, step, data):
    manifest = _copy(opened(sound)[0])
    mutate(data, manifest)
    try:
        sealed = seal_manifest(manifest)
    except (KeyError, AttributeError, msgspec.MsgspecError, OverflowError):
        return
    (step / "manifest").write_bytes(sealed)
    survives(step, sound)


@given(st.data())
def test_an_index_that_says_anything(sound, step, data):
    """Its chunks, or its head: files, pages, record."""
    manifest, index = map(_copy, opened(sound, rank := data.draw(st.integers(0, 3))))
    in_head = data.draw(st.booleans())
    if not in_head:
        mutate(data, index)
    try:
        sealed, manifest["indexes"][rank] = seal_index(index, (lambda head: mutate(data, head)) if in_head else None)
    except (TypeError, KeyError, IndexError, AttributeError, msgspec.MsgspecError, OverflowError):
        return  # nothing that could be sealed
    (step / index_name(rank)).write_bytes(sealed)
    (step / "manifest").write_bytes(seal_manifest(manifest))
    try:
        survives(step, sound)
    finally:
        shutil.copy(sound / index_name(rank), step / index_name(rank))


def _reseal(data: bytes) -> bytes:
    """Right sizes and checksums for whatever head and body there are."""
    head_bytes = _ENVELOPE.unpack_from(data)[3]
    head, body = data[_ENVELOPE.size : _ENVELOPE.size + head_bytes], data[_ENVELOPE.size + head_bytes :]
    return _ENVELOPE.pack(*_ENVELOPE.unpack_from(data)[:3], len(head), len(body), digest(head), digest(body)) + head + body


@given(st.data())
def test_bytes_changed_removed_or_added_anywhere(sound, step, data):
    """With the old checksums and with right ones."""
    raw = bytearray((sound / "manifest").read_bytes())
    begin = data.draw(st.integers(0, len(raw) - 1))
    end = data.draw(st.integers(begin, min(begin + 20, len(raw))))
    raw[begin:end] = data.draw(st.binary(max_size=30))
    if len(raw) >= _ENVELOPE.size and data.draw(st.booleans()) and raw[:8] == b"lockstep":
        raw = _reseal(bytes(raw))
    (step / "manifest").write_bytes(raw)
    survives(step, sound)


@given(st.data())
def test_a_head_or_a_body_that_ends_early(sound, step, data):
    raw = (sound / "manifest").read_bytes()
    head_bytes = _ENVELOPE.unpack_from(raw)[3]
    head, body = raw[_ENVELOPE.size : _ENVELOPE.size + head_bytes], raw[_ENVELOPE.size + head_bytes :]
    head, body = head[: data.draw(st.integers(0, len(head)))], body[: data.draw(st.integers(0, len(body)))]
    if (len(head), len(body)) == (head_bytes, len(raw) - _ENVELOPE.size - head_bytes):
        return
    (step / "manifest").write_bytes(_ENVELOPE.pack(b"lockstep", 1, 1, len(head), len(body), digest(head), digest(body)) + head + body)
    survives(step, sound)
    with pytest.raises(CheckpointCorrupt):
        StoredCheckpoint(LocalStorage(step.parent), step.name)


RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["progress", "models", "groups", "params", "values", "config", "", "engine"]) | st.integers(0, 9), inner, max_size=4
        )
    ),
    max_leaves=15,
)


@given(RECORDS | st.binary(max_size=60))
@example([[[]]])
def test_a_record_that_holds_anything(sound, step, record):
    manifest = opened(sound)[0]
    manifest["record"] = record if isinstance(record, bytes) else msgspec.msgpack.encode(record)
    (step / "manifest").write_bytes(seal_manifest(manifest))
    survives(step, sound)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01", b"\x81\xa7tensors\x91", b"\x91\x91\x90\x91"])
@pytest.mark.parametrize("place", ["head", "body", "record"])
def test_deep_nesting(sound, step, opening, place):
    deep = opening * 200_000
    if place == "record":
        manifest = opened(sound)[0]
        manifest["record"] = deep
        data = seal_manifest(manifest)
    else:
        raw = (sound / "manifest").read_bytes()
        head_bytes = _ENVELOPE.unpack_from(raw)[3]
        head, body = (deep, raw[_ENVELOPE.size + head_bytes :]) if place == "head" else (raw[_ENVELOPE.size : _ENVELOPE.size + head_bytes], deep)
        data = _ENVELOPE.pack(b"lockstep", 1, 1, len(head), len(body), digest(head), digest(body)) + head + body
    (step / "manifest").write_bytes(data)
    survives(step, sound)


# ---------------------------------------------------------------- headers of shard files

ENTRIES = [Entry("a", "F32", (2, 0), (3, 4), 0, 48), Entry("modèle", "BF16", (), (), 48, 2), Entry("e", "I64", (0, 0), (0, 5), 50, 0)]


@given(st.data())
def test_a_damaged_header_is_corrupt_or_still_means_boxes(data):
    raw = bytearray(encode_header(ENTRIES))
    text = len(raw.rstrip(b" "))
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, text - 1))
        raw[begin : data.draw(st.integers(begin, begin + 3))] = data.draw(st.binary(max_size=4))
    _means_boxes(bytes(raw))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=4) | st.sampled_from(["F32", "U8", "pt", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "DCP_SHARDING_INFO", "a", "saved_offsets"]), inner, max_size=4
        )
    ),
    max_leaves=15,
)


@given(_JSON)
def test_a_header_of_any_json_is_corrupt_or_means_boxes(value):
    import json

    text = json.dumps(value).encode()
    _means_boxes(struct.pack("<Q", len(text)) + text)


def _means_boxes(raw: bytes) -> None:
    try:
        entries = decode_header(raw, "here")
    except CheckpointCorrupt:
        return
    end = 0
    for entry in entries:
        assert entry.offset == end
        assert len(entry.offsets) == len(entry.sizes)
        end += entry.nbytes


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}", b'{"__metadata__":null}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a":1' + b"0" * 5000 + b"}",
        b'{"__metadata__":{"DCP_SHARDING_INFO":"{}"},"__metadata__":{"DCP_SHARDING_INFO":"{}"}}',
        b'{"__metadata__":{"DCP_SHARDING_INFO":"{\\"a\\":{\\"saved_offsets\\":[]},\\"a\\":{\\"saved_offsets\\":[1]}}"}}',
        b'{"__metadata__":{"DCP_SHARDING_INFO":"[[[["}}', b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b'{"\\ud800":{}}',
    ],
)  # fmt: skip
def test_malformed_headers_are_corrupt(text):
    with pytest.raises(CheckpointCorrupt, match="here has a header that"):
        decode_header(struct.pack("<Q", len(text)) + text, "here")


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 4087) + encode_header(ENTRIES)[8:]])
def test_a_header_of_another_length_than_it_says_is_corrupt(raw):
    with pytest.raises(CheckpointCorrupt, match=r"here has a header that.*(its length word says|buffer of at least 8 bytes)"):
        decode_header(raw, "here")


# ---------------------------------------------------------------- time and memory, in proportion to what is in the file


def _array(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


def _body(tensors: bytes = b"\x90", indexes: bytes = b"\x90") -> bytes:
    return b"\x84\xa7tensors" + tensors + b"\xa7aliases\x80\xa7indexes" + indexes + b"\xa6record\xc4\x00"


_N, _PAGE = 100_000, b"\x95\x00\x00\x00\x00\xc4\x00"
BOMBS = {
    "tensors": (_Body, _body(_array(_N) + b"\x94\xa0\xa0\x90\x90" * _N)),
    "parts": (_Body, _body(b"\x91\x94\xa0\xa0\x90" + _array(_N) + b"\x91\x91\xa6absent" * _N)),
    "ranks": (_Body, _body(b"\x91\x94\xa0\xa0\x90\x91\x91\x93\xa4grid\x94\x90\x00\x90" + _array(_N) + b"\x01" * _N + b"\x90")),
    "indexes": (_Body, _body(indexes=_array(_N) + b"\x92\x00\xc4\x00" * _N)),
    "chunks": (list[Chunk], _array(_N) + b"\x97\x00\x90\x90\x00\x00\x00\xc4\x00" * _N),
    "pages": (IndexHead, b"\x84\xa4rank\x00\xa5files\x90\xa5pages" + _array(_N) + _PAGE * _N + b"\xa6record" + _PAGE),
    "record": (None, _array(_N) + b"\x80" * _N),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_decoding_takes_memory_in_proportion_to_the_file(name):
    """As much as Python's objects are larger than msgpack's: documented in docs/format.md."""
    kind, data = BOMBS[name]
    tracemalloc.start()
    decode_record(data) if kind is None else msgspec.msgpack.decode(data, type=kind)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (100 if kind is None else 20) * len(data)


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"], ids=["array", "map", "bytes", "text", "extension"])
@pytest.mark.parametrize("field", [b"tensors", b"aliases", b"indexes", b"record", b"other"])
def test_a_huge_declared_length_allocates_nothing(sound, step, head, field):
    raw = (sound / "manifest").read_bytes()
    head_bytes = _ENVELOPE.unpack_from(raw)[3]
    body = b"\x81" + bytes([0xA0 + len(field)]) + field + head + b"\xff" * 4
    (step / "manifest").write_bytes(_reseal(raw[: _ENVELOPE.size + head_bytes] + body))
    tracemalloc.start()
    with pytest.raises(CheckpointCorrupt):
        StoredCheckpoint(LocalStorage(step.parent), step.name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def _seconds(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def test_a_hundred_thousand_parts_take_a_second(sound, step):
    """Of one tensor, in rows; each part is checked, and that they tile it."""
    manifest = opened(sound)[0]
    rows = 10**5
    part = lambda i: [["absent", 0.0], [i, 0, 0], [1, 4, 4], ""]  # noqa: E731
    manifest["tensors"] = [["t", "F32", [rows, 4, 4], [part(i) for i in range(rows)]]]
    (step / "manifest").write_bytes(seal_manifest(manifest))
    assert _seconds(lambda: StoredCheckpoint(LocalStorage(step.parent), step.name)) < SECONDS
    manifest["tensors"][0][3][-1] = part(3)
    (step / "manifest").write_bytes(seal_manifest(manifest))
    with pytest.raises(CheckpointCorrupt, match="its 100000 parts overlap or leave gaps"):
        StoredCheckpoint(LocalStorage(step.parent), step.name)


def test_lists_of_many_ranks_take_a_second(sound, step):
    manifest = opened(sound)[0]
    ranks = list(range(10**5))
    manifest["summary"]["world_size"], manifest["indexes"] = len(ranks), [[1, b"d" * 16]] * len(ranks)
    mesh = [[len(ranks)], 0, [], [*ranks[1:], 0]]
    manifest["tensors"] = [[f"t{i}", "F32", [len(ranks)], [[["grid", mesh, [0], 0], [], [], ""]]] for i in range(20)]
    (step / "manifest").write_bytes(seal_manifest(manifest))
    assert _seconds(lambda: StoredCheckpoint(LocalStorage(step.parent), step.name)) < SECONDS


def test_the_examples_reach_far_enough(sound, step):
    """Of mutations of a manifest some are accepted, and of those that are refused not all by the decoder."""
    manifest = _copy(opened(sound)[0])
    manifest["tensors"][0][1] = "F64"
    (step / "manifest").write_bytes(seal_manifest(manifest))
    found = verify(LocalStorage(step.parent), step.name)
    assert len({problem.file for problem in found}) > 2
    with unsynced():
        shutil.copy(sound / "manifest", step / "manifest")
    assert verify(LocalStorage(step.parent), step.name) == []
