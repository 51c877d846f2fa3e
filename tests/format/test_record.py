"""The typed record carries plain values exactly, refuses objects by path, and decodes nothing but values."""

import contextlib
import math
import struct
import tracemalloc
from collections import OrderedDict, namedtuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointCorrupt, UsageError
from engine.format.record import Array, Reference, decode_record, encode_record

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.binary(max_size=5)
)
_KEYS = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3) | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=3) | st.none()
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)


def _bits(value):
    """Types and bits: tells -0.0 from 0.0, True from 1, a tuple from a list, and any two NaNs alike."""
    if isinstance(value, float):
        return ("float", struct.pack("<d", value) if not math.isnan(value) else "nan")
    if isinstance(value, complex):
        return ("complex", _bits(value.real), _bits(value.imag))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [_bits(v) for v in value])
    if isinstance(value, dict):
        return ("dict", [(_bits(k), _bits(v)) for k, v in value.items()])
    return (type(value).__name__, value)


@given(VALUES)
def test_plain_values_round_trip_exactly(value):
    assert _bits(decode_record(encode_record(value))) == _bits(value)


@pytest.mark.parametrize(
    "value",
    [math.inf, -math.inf, math.nan, -0.0, 5e-324, 2**63, -(2**63) - 1, 2**64, -(2**64), 10**100, complex(math.nan, -0.0), b"", (), ((), [((1,),)]),
     {1: "int", "1": "str", b"1": "bytes", None: 0, 1.5: (), True + 1: []}],
    ids=repr,
)  # fmt: skip
def test_the_awkward_ones_round_trip_exactly(value):
    assert _bits(decode_record(encode_record({"x": [value]}))) == _bits({"x": [value]})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.1), float(np.float32(0.1))), (np.float64(0.1), 0.1), (np.int64(-3), -3), (np.bool_(True), True), (torch.tensor(2.5), 2.5),
        (torch.tensor(7), 7), (torch.Size([2, 3]), (2, 3)), (OrderedDict(a=1), {"a": 1}), (namedtuple("P", "x y")(1, 2), (1, 2)),
    ],
    ids=repr,
)  # fmt: skip
def test_scalars_of_numpy_and_torch_and_subclasses_become_plain(value, plain):
    assert _bits(decode_record(encode_record(value))) == _bits(plain)


def _own() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"optimizer": {"groups": [1, {"lr": object()}]}}, r"record\['optimizer'\]\['groups'\]\[1\]\['lr'\] is a object"),
        ({"a": {1, 2}}, r"record\['a'\] is a set"),
        ({"f": (1, print)}, r"record\['f'\]\[1\] is a builtin_function"),
        ([torch.zeros(2)], r"record\[0\] is a Tensor"),
        ([np.zeros(2)], r"record\[0\] is a ndarray"),
        ({"a": {(1, 2): 3}}, r"record\['a'\] has a key of type tuple"),
        ({np.float64(1): 3}, r"record has a key of type float64"),
        ({"a": {2**64: 3}}, r"record\['a'\] has the key 18446744073709551616"),
        ({"name": "\ud800"}, r"record\['name'\] is text that UTF-8 cannot carry"),
        ({"a": {"\ud800": 1}}, r"a key of record\['a'\] is text that UTF-8 cannot carry"),
        ([np.longdouble(1)], r"record\[0\] is nested deeper"),
        (_own(), r"nested deeper than 64"),
        ({"n": 2**8192}, r"record\['n'\] is an integer of 8193 bits"),
        ({"n": -(2**8192)}, r"record\['n'\] is an integer of 8193 bits"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_no_record_holds_is_refused_by_path(value, path):
    with pytest.raises(UsageError, match=path):
        encode_record(value)


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_values_or_corrupt(data):
    with contextlib.suppress(CheckpointCorrupt):
        decode_record(data)


@given(VALUES, st.data())
def test_damaged_records_are_values_or_corrupt(value, data):
    raw = bytearray(encode_record(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointCorrupt):
        decode_record(bytes(raw))


_Ext, _pack = msgspec.msgpack.Ext, msgspec.msgpack.encode


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xa1\xff", b"\x81\x80\x01", b"\x91" * 200_000, _pack([1, 2]) + b"\x00",
        _pack(_Ext(1, b"\x05")), _pack(_Ext(1, b"\xc0")), _pack(_Ext(3, b"short")), _pack(_Ext(99, b"")), _pack(_Ext(-128, b"x")),
    ],
)  # fmt: skip
def test_malformed_records_are_corrupt(data):
    with pytest.raises(CheckpointCorrupt, match="a state record cannot be decoded"):
        decode_record(data)


def _nested(levels: int) -> list:
    value: list = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_what_is_deeper_than_a_record_can_be_is_corrupt():
    """So that whoever walks a record may do so by recursion."""
    deepest = _nested(65)
    assert decode_record(encode_record(deepest)) == deepest
    for deeper in (_nested(66), {"a": _nested(65)}, _nested(500)):
        with pytest.raises(CheckpointCorrupt, match="nested deeper than 64 levels"):
            decode_record(_pack(deeper))


def test_integers_that_python_would_not_print_are_corrupt():
    for value in (2**8191 - 1, 1 - 2**8191):
        assert decode_record(encode_record(value)) == value
        assert str(value)
    with pytest.raises(CheckpointCorrupt, match="extension type 2 of 1025 bytes is not known"):
        decode_record(_pack(_Ext(2, b"\x01" * 1025)))


def test_references_and_arrays_round_trip():
    value = {"t": Reference("ema.shadow"), "a": [Array("numpy", "F32", (2, 0, 3), b""), Array("torch", "BF16", (), b"\x80\x3f")]}
    assert decode_record(encode_record(value)) == value


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (("torch", "F32", (2,), b"1234567"), "with 7 bytes"),
        (("jax", "F32", (1,), b"1234"), "kind 'jax'"),
        (("torch", "F33", (1,), b"1234"), "dtype 'F33'"),
        (("torch", "F32", (-1, -1), b"1234"), "shape"),
        (("torch", "F32", (2**62, 0), b""), "shape"),
        (("torch", "F32", (1,) * 65, b"1234"), "length <= 64"),
    ],
)
def test_malformed_arrays_are_corrupt(array, told):
    with pytest.raises(CheckpointCorrupt, match=told):
        decode_record(_pack(_Ext(5, _pack(array))))


def test_tuples_nested_without_end_are_corrupt():
    data = b"\x05"
    for _ in range(3000):
        data = _pack(_Ext(1, b"\x91" + data))
    with pytest.raises(CheckpointCorrupt):
        decode_record(data)


def test_a_huge_declared_length_allocates_nothing():
    tracemalloc.start()
    for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):
        with pytest.raises(CheckpointCorrupt):
            decode_record(head + b"\xff" * 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
