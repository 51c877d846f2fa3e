"""How many containers a record has, counted without making them: a byte of msgpack may become a
hundred bytes of Python's objects.

Containers are arrays, maps and extension values. Walking them is what a reader does in Python, at a
microsecond each; numbers and text between them cost little.
"""

import re

MAX_CONTAINERS = 1 << 20

_HEADS = bytes([*range(0x80, 0xA0), *range(0xC7, 0xCA), *range(0xD4, 0xD9), *range(0xDC, 0xE0)])
_COUNTED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bytes, extensions and text whose length follows the head, in as many bytes."""
_ARRAYS = {0xDC: 3, 0xDE: 3, 0xDD: 5, 0xDF: 5}


def _short(base: int) -> bytes:
    """Of text and bytes of up to 31 bytes: the length, added to ``base``, and that many bytes."""
    return b"|".join(re.escape(bytes([base + n])) + b"." * n for n in range(32))


_PLAIN = re.compile(
    rb"(?s:[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]+|[\xcc\xd0].|[\xcd\xd1]..|"
    rb"[\xca\xce\xd2].{4}|[\xcb\xcf\xd3].{8}|" + _short(0xA0)
    + rb"|(?:[\xc4\xd9]|[\xc5\xda]\x00|[\xc6\xdb]\x00\x00\x00)(?:" + _short(0) + rb"))*+"
)  # fmt: skip
"""A run of numbers, short text and the like."""


def has_too_many(data: bytes, inside: frozenset[bytes]) -> bool:
    """Return whether a record has more than :data:`MAX_CONTAINERS`. Extension values of the types
    ``inside`` hold further values.

    Of what is not msgpack, it looks at as much as a decoder would.
    """
    if len(data) - len(data.translate(None, _HEADS)) <= MAX_CONTAINERS:
        return False  # nearly always; else some may be bytes of other values
    position = count = 0
    while count <= MAX_CONTAINERS and (position := _end_of_plain(data, position)) < len(data):
        head = data[position]
        if 0x80 <= head < 0xA0:
            position, count = position + 1, count + 1
        elif head in _ARRAYS:
            position, count = position + _ARRAYS[head], count + 1
        elif 0xD4 <= head < 0xD9:
            size_bytes = 0 if data[position + 1 : position + 2] in inside else 1 << (head - 0xD4)
            position, count = position + 2 + size_bytes, count + 1
        elif head in _COUNTED:
            begin = position + 1 + _COUNTED[head]
            size_bytes, is_extension = (
                int.from_bytes(data[position + 1 : begin]),
                0xC7 <= head < 0xCA,
            )
            if is_extension and data[begin : begin + 1] in inside:
                size_bytes = 0
            position, count = begin + is_extension + size_bytes, count + is_extension
        else:
            return False
    return count > MAX_CONTAINERS


def _end_of_plain(data: bytes, position: int) -> int:
    found = _PLAIN.match(data, position)
    return found.end() if found else position
