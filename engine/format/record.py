"""The typed record: everything that is not a tensor, as msgpack. Decoding can build values only, never run code.

Carried exactly: None, bool, int of any size, float with inf and nan, complex, str, bytes, list, tuple, dict with str, int,
float, bool, bytes or None keys; small arrays; references to logical tensors, in the place of a tensor; and values
of a few further types (a set, a deque, a dtype), as a word and what the value is made of: see ``engine.state.values``.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import CheckpointCorrupt, UsageError
from engine.format.containers import MAX_CONTAINERS, has_too_many
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Dims

_TUPLE, _INT, _COMPLEX, _REFERENCE, _ARRAY, _TYPED = 1, 2, 3, 4, 5, 6
_NESTING = frozenset({b"%c" % _TUPLE, b"%c" % _TYPED})
_MAX_DEPTH = 64
MAX_INT_BITS = 8192  # Python refuses to print integers of more than 4,300 digits
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # msgpack's own ints


class Reference(Struct, frozen=True, array_like=True):
    """The logical tensor ``name`` belongs here."""

    name: str


class Array(Struct, frozen=True, array_like=True):
    """A small array in row-major order. ``kind``: ``torch`` or ``numpy``; ``dtype`` by safetensors' names."""

    kind: str
    dtype: str
    shape: Dims
    data: bytes


class Typed(Struct, frozen=True, array_like=True):
    """A value of the type that ``kind`` names, made of ``value``. Readers know the kinds; nothing is
    imported or called by name."""

    kind: str
    value: Any


_CONTAINERS = frozenset({list, tuple, dict, Typed})


class EncodedList:
    """Stands for a list of ``count`` values, which are encoded already: the first ``size`` bytes of ``items``."""

    def __init__(self, count: int, items: bytearray, size: int) -> None:
        self._count, self._items, self._size = count, items, size

    def encode(self) -> bytes:
        if self._count < 16:
            header = bytes([0x90 | self._count])
        elif self._count < 1 << 16:
            header = struct.pack(">BH", 0xDC, self._count)
        else:
            header = struct.pack(">BI", 0xDD, self._count)
        return header + self._items[: self._size]


def encode_record(value: Any) -> bytes:
    """Encode ``value``. Raises :class:`UsageError` naming the path of what a record cannot hold."""
    return encode_packed(pack_record(value))


def pack_record(value: Any, name: str = "record") -> Any:
    """Return a copy of ``value`` for :func:`encode_packed`. Raises :class:`UsageError` as :func:`encode_record` does, with paths that
    begin with ``name``."""
    return _pack(value, name, 0)


def encode_packed(packed: Any) -> bytes:
    """Encode what :func:`pack_record` returned, perhaps in a different thread. Raises :class:`UsageError` for more containers than
    a reader takes."""
    data = msgspec.msgpack.encode(packed, enc_hook=lambda value: msgspec.Raw(value.encode()))
    if has_too_many(data, _NESTING):
        raise UsageError(
            f"the state that is not in tensors has more than {MAX_CONTAINERS} lists, tuples, dicts and other containers; "
            "a checkpoint takes no more. Keep large collections as tensors or NumPy arrays"
        )
    return data


def decode_record(data: bytes) -> Any:
    """Return the value that was encoded. Raises :class:`CheckpointCorrupt`."""
    if has_too_many(data, _NESTING):
        raise CheckpointCorrupt(f"a state record has more than {MAX_CONTAINERS} containers")
    try:
        value = msgspec.msgpack.decode(data, ext_hook=_unpack, strict=False)
        _check_depth(value)
        return value
    except (msgspec.MsgspecError, ValueError, TypeError, struct.error, RecursionError) as e:
        raise CheckpointCorrupt(f"a state record cannot be decoded: {e}") from e


def _check_depth(value: Any) -> None:
    """Whoever walks a record may do so by recursion."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _containers_in(outer)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")


def _containers_in(value: Any) -> Sequence[Any]:
    inner = value.value if type(value) is Typed else value
    inner = inner.values() if type(inner) is dict else inner if type(inner) in (list, tuple) else [inner] if type(inner) is Typed else ()
    return () if _CONTAINERS.isdisjoint(map(type, inner)) else [v for v in inner if type(v) in _CONTAINERS]


def _pack(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise UsageError(f"{path[:200]} is nested deeper than {_MAX_DEPTH} levels")
    if value is None or type(value) in (bool, float, bytes):
        return value
    if type(value) is str:
        return _text(value, path)
    if type(value) is int:
        if _SMALLEST <= value <= _LARGEST:
            return value
        if value.bit_length() >= MAX_INT_BITS:
            raise UsageError(f"{path[:200]} is an integer of {value.bit_length()} bits; a record takes fewer than {MAX_INT_BITS}")
        return msgspec.msgpack.Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if type(value) is complex:
        return msgspec.msgpack.Ext(_COMPLEX, struct.pack("<dd", value.real, value.imag))
    if type(value) is list:
        if value and all(type(v) is str for v in value) and "".join(value).isascii():  # names, by the thousand
            return value.copy()
        return [_pack(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode([_pack(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]))
    if isinstance(value, dict):
        for key in value:
            if not (key is None or type(key) in (str, int, float, bool, bytes)):
                raise UsageError(f"{path} has a key of type {type(key).__name__}; a record takes str, int, float, bool, bytes or None")
            if type(key) is int and not _SMALLEST <= key <= _LARGEST:
                raise UsageError(f"{path} has the key {key}; a record takes int keys of up to 64 bits")
            if type(key) is str:
                _text(key, f"a key of {path}")
        return {k: _pack(v, f"{path}[{k!r}]", depth + 1) for k, v in value.items()}
    if type(value) is EncodedList:
        return value
    if isinstance(value, Reference | Array):
        return msgspec.msgpack.Ext(_REFERENCE if isinstance(value, Reference) else _ARRAY, msgspec.msgpack.encode(value))
    if isinstance(value, Typed):
        return msgspec.msgpack.Ext(_TYPED, msgspec.msgpack.encode([value.kind, _pack(value.value, path, depth + 1)]))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy scalars and 0-d tensors
        return _pack(value.item(), path, depth + 1)  # deeper, because a long double's item is itself
    raise UsageError(
        f"{path} is a {type(value).__name__}, which a record cannot hold; it takes None, bool, int, float, complex, str, bytes, "
        "list, tuple and dict. Convert it, or give the object as a member with state_dict/load_state_dict"
    )


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{path[:200]} is text that UTF-8 cannot carry ({e.reason}): {value[:200]!a}") from e
    return value


def _unpack(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, ext_hook=_unpack, strict=False))
    if code == _INT and len(data) <= MAX_INT_BITS // 8:
        return int.from_bytes(data, "little", signed=True)
    if code == _COMPLEX:
        return complex(*struct.unpack("<dd", data))
    if code == _REFERENCE:
        return msgspec.msgpack.decode(data, type=Reference)
    if code == _ARRAY:
        array = msgspec.msgpack.decode(data, type=Array)
        if array.kind not in ("torch", "numpy") or array.dtype not in ITEM_BYTES or not _is_shape(array.shape):
            raise ValueError(f"an array of kind {array.kind!r}, dtype {array.dtype!r} and shape {array.shape}")
        if len(array.data) != math.prod(array.shape) * ITEM_BYTES[array.dtype]:
            raise ValueError(f"an array of shape {array.shape} and dtype {array.dtype} with {len(array.data)} bytes")
        return array
    if code == _TYPED:
        kind, inner = msgspec.msgpack.decode(data, ext_hook=_unpack, strict=False)
        if type(kind) is not str:
            raise ValueError(f"a typed value of kind {kind!r}")
        return Typed(kind, inner)
    raise ValueError(f"extension type {code} of {len(data)} bytes is not known")


def _is_shape(shape: tuple[int, ...]) -> bool:
    """Also where the array is empty, no other extent may be larger than what libraries compute with."""
    return min(shape, default=0) >= 0 and math.prod(n for n in shape if n) < 2**48


EMPTY_RECORD = encode_record(None)
"""Of an index that has no state of a rank's own."""
