"""Checkpoints as an attacker makes them: what a step's files say is changed in structure, and all
checksums are made right again."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import UsageError
from engine.format.checksum import digest
from engine.format.manifest import _ENVELOPE, MANIFEST, _seal, index_name
from engine.format.record import decode_record, encode_record

FORGED = "FORGED"
_TEXTS = (
    "", "\x1b]0;title\x07", f"a\n{FORGED} line", "\u202e\u2066", "\u2028\u200b\x9b\x7f", "__metadata__", "model.__metadata__", "../../../etc/x",
    "x" * 300, "x" * 70_000, "model.0.weight", "F32", "F8_E8M0", "grid", "flat", "absent", "format", "nan", "\x00", "min", "cpu", "rng",
)  # fmt: skip
_STAIN = f"\x1b[31m\r\u202e\u200b\n{FORGED}"
_STAINED = 0.2
_NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    2**31,
    2**53,
    2**62,
    2**62 + 1,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    10**17,
    10**18,
)
_FLOATS = (0.0, -0.0, 0.5, -1.0, 1e30, 1e308, float("nan"), float("inf"), float("-inf"))
_LAYOUTS = (
    ["absent", 0.0], ["absent", float("nan")], ["flat", [[1], 0, [], []], 0, 1 << 40], ["flat", [[2**60], 0, [], []], 0, 1],
    ["grid", [[1], 0, [], []], [-1], 0], ["grid", [[1], 0, [], []], [0], 0], ["grid", [[1] * 64, 0, [], []], [-1] * 64, 0],
    ["grid", [[2, 2], 0, [1, 2], []], [0, 0], 0],
)  # fmt: skip


def _any(chance: random.Random) -> Any:
    kinds = (
        _TEXTS,
        _NUMBERS,
        _FLOATS,
        _LAYOUTS,
        (None, True, False, b"", b"d" * 16, [], {}, [[]], [0] * 65, {"": ""}),
    )
    return _copied(chance.choice(chance.choice(kinds)))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _places(value[key], found)
    return found


def mutate(value: Any, chance: random.Random) -> None:
    """Change one to three places in it, or stain many of its texts."""
    if chance.random() < _STAINED:
        return _stain(value, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = _places(value, [])
        if not places:
            return
        container, key = chance.choice(places)
        _CHANGES[chance.choice(list(_CHANGES))](container, key, chance, places)


def _stain(value: Any, chance: random.Random) -> None:
    for container, key in _places(value, []):
        if isinstance(container[key], str) and chance.random() < 0.3:
            container[key] += _STAIN
        if isinstance(container, dict) and isinstance(key, str) and chance.random() < 0.05:
            container[key + _STAIN] = container.pop(key)


def _replace(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    container[key] = _any(chance)


def _alike(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    """A value of the same type, at its extremes."""
    old = container[key]
    if isinstance(old, bool) or not isinstance(old, int | float | str):
        container[key] = _any(chance)
    elif isinstance(old, str):
        container[key] = chance.choice((chance.choice(_TEXTS), old + chance.choice(_TEXTS)))
    else:
        container[key] = chance.choice((*(_NUMBERS if isinstance(old, int) else _FLOATS), old + 1, old - 1, -old, old * 2))


def _remove(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    del container[key]


def _repeat(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    count = chance.choice((1, 3, 1000))
    if isinstance(container, list):
        container[key:key] = [_copied(container[key]) for _ in range(count)]
    elif isinstance(container[key], list):
        container[key] = [_copied(inner) for _ in range(count) for inner in container[key][:8]]


def _empty(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    container[key] = type(container[key])() if isinstance(container[key], list | dict | str | bytes) else 0


def _nest(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    for _ in range(chance.choice((1, 60, 70, 300))):
        container[key] = chance.choice(([container[key]], {"a": container[key]}))


def _exchange(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    other, at = chance.choice(places)
    container[key] = _copied(other[at])


def _rename(container: Any, key: Any, chance: random.Random, places: Any) -> None:
    if isinstance(container, dict):
        container[chance.choice((*_TEXTS, f"{key}{chance.choice(_TEXTS)}", 7, None))] = container.pop(key)
    else:
        container[key] = _any(chance)


_Change = Callable[[Any, Any, random.Random, Any], None]
_CHANGES: dict[str, _Change] = {change.__name__: change for change in (_replace, _alike, _remove, _repeat, _empty, _nest, _exchange, _rename)}


class Forgery:
    """A sound step of one rank, taken apart into builtins. ``parts`` are what may be changed, each
    with how often it is."""

    def __init__(self, step: Path) -> None:
        self.step = step
        head, body = _opened(step / MANIFEST)
        self._head, self._body = msgspec.msgpack.decode(head), msgspec.msgpack.decode(body)
        self._names = [entry[2] or index_name(i) for i, entry in enumerate(self._body["indexes"])]
        self._indexes = [_opened(step / name) for name in self._names]

    def forge(self, seed: int) -> dict[str, bytes]:
        """Return files of the step to replace. Raises :class:`ValueError` for what cannot be
        written at all."""
        chance = random.Random(seed)
        try:
            return self._forge(chance)
        except (
            msgspec.MsgspecError,
            UsageError,
            TypeError,
            OverflowError,
            IndexError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as e:
            raise ValueError(f"seed {seed}: {e!r}") from e

    def _forge(self, chance: random.Random) -> dict[str, bytes]:
        head, body = _copied(self._head), _copied(self._body)
        files: dict[str, bytes] = {}
        what = chance.choices(("head", "tensors", "body", "record", "index", "header"), (3, 6, 2, 6, 4, 2))[0]
        if what in ("head", "body"):
            mutate(head if what == "head" else body, chance)
        elif what == "tensors":
            mutate(body["tensors"], chance)
        elif what == "record":
            body["record"] = _mutated_record(body["record"], chance)
        else:
            number = chance.randrange(len(self._indexes))
            data, entry = self._index(number, chance, files if what == "header" else None)
            entry += [self._body["indexes"][number][2]] if self._body["indexes"][number][2] else [""]
            if entry[2]:
                entry[2] = f"frozen.{entry[1].hex()}.index"
            body["indexes"][number] = entry
            files[entry[2] or self._names[number]] = data
        return {
            **files,
            MANIFEST: _seal("manifest", msgspec.msgpack.encode(head), msgspec.msgpack.encode(body)),
        }

    def _index(self, number: int, chance: random.Random, headers: dict[str, bytes] | None) -> tuple[bytes, list[Any]]:
        """One whose head, chunks, record, or shard file's header (put into ``headers``) has been
        changed."""
        raw_head, raw_body = self._indexes[number]
        head = msgspec.msgpack.decode(raw_head)
        pages = [msgspec.msgpack.decode(raw_body[page[2] : page[2] + page[3]]) for page in head["pages"]]
        record = raw_body[head["record"][2] :]
        what = chance.choice(("head", "chunks", "record")) if headers is None else "header"
        if what == "header":
            file = chance.choice(head["files"])
            headers[file[0]], file[1], file[2], file[3] = self._header(file, chance)  # pyright: ignore[reportOptionalSubscript]
        elif what == "chunks":
            mutate(pages, chance)
        elif what == "record":
            record = _mutated_record(record, chance)
        encoded = [msgspec.msgpack.encode(page) for page in pages]
        begin = 0
        for page, chunks, data in zip(head["pages"], pages, encoded, strict=False):
            page[1:] = [len(chunks), begin, len(data), digest(data)]
            begin += len(data)
        body = b"".join(encoded) + record
        head["record"] = [0, 0, begin, len(record), digest(record)]
        if what == "head":
            mutate(head, chance)
        text = msgspec.msgpack.encode(head)
        sealed = _seal("index", text, body)
        return sealed, [len(sealed), digest(sealed[: _ENVELOPE.size + len(text)])]

    def _header(self, file: list[Any], chance: random.Random) -> tuple[bytes, int, int, bytes]:
        """A shard file with a different header, and what an index says of it."""
        data = (self.step / file[0]).read_bytes()
        header = msgspec.json.decode(data[8 : file[2]])
        header["__metadata__"]["DCP_SHARDING_INFO"] = info = msgspec.json.decode(header["__metadata__"]["DCP_SHARDING_INFO"])
        mutate(header, chance)
        if isinstance(header.get("__metadata__"), dict) and "DCP_SHARDING_INFO" in header["__metadata__"]:
            header["__metadata__"]["DCP_SHARDING_INFO"] = msgspec.json.encode(info).decode()
        text = msgspec.json.encode(header)
        text = text.ljust(max(len(text), file[2] - 8))
        raw = struct.pack("<Q", len(text)) + text
        return raw + data[file[2] :], len(raw) + len(data) - file[2], len(raw), digest(raw)


def _opened(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    begin = _ENVELOPE.size + _ENVELOPE.unpack_from(data)[3]
    return data[_ENVELOPE.size : begin], data[begin:]


def _mutated_record(record: bytes, chance: random.Random) -> bytes:
    value = [decode_record(record)]
    mutate(value, chance)
    return encode_record(value[0])
