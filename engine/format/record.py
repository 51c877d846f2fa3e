"""The typed record: everything that is not a tensor, as msgpack. Decoding can build values only, never run code.

Carried exactly: None, bool, int of any size, float with inf and nan, complex, str, bytes, list, tuple, dict with str, int,
float, bool, bytes or None keys.
"""

import struct
from typing import Any

import msgspec

from engine.errors import CheckpointCorrupt, UsageError

_TUPLE, _INT, _COMPLEX = 1, 2, 3
_MAX_DEPTH = 64
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1  # msgpack's own ints


def encode_record(value: Any) -> bytes:
    """Raises :class:`UsageError` naming the path of a value that no record can hold."""
    return msgspec.msgpack.encode(_pack(value, "record", 0))


def decode_record(data: bytes) -> Any:
    try:
        return msgspec.msgpack.decode(data, ext_hook=_unpack, strict=False)
    except (msgspec.MsgspecError, ValueError, TypeError, struct.error, RecursionError) as e:
        raise CheckpointCorrupt(f"a state record cannot be decoded: {e}") from e


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
        return msgspec.msgpack.Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if type(value) is complex:
        return msgspec.msgpack.Ext(_COMPLEX, struct.pack("<dd", value.real, value.imag))
    if type(value) is list:
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
    if code == _INT:
        return int.from_bytes(data, "little", signed=True)
    if code == _COMPLEX:
        return complex(*struct.unpack("<dd", data))
    raise ValueError(f"extension type {code} is not known")
