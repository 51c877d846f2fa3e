"""What the commands print with."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import msgspec

from engine.printable import printable

RIGHT = ">"
WIDEST = 120
"""A column is at most as wide; a longer cell moves what follows it in its line."""


def say(*lines: str, error: bool = False) -> None:
    """Print lines, on the standard error if ``error``. A checkpoint may be hostile: nothing is printed in any other way."""
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout)


def dump(told: Any) -> None:
    """Print as JSON, in ASCII."""
    print(msgspec.json.format(json.dumps(told), indent=2))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Lines of aligned columns; those whose head begins with ``>`` to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    names = [head.removeprefix(RIGHT) for head in heads]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(names, *rows, strict=True)]
    signs = [RIGHT if head.startswith(RIGHT) else "<" for head in heads]
    return [
        (indent + "  ".join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True))).rstrip() for row in (names, *rows)
    ]


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f}" if size_bytes >= 1e5 or not size_bytes else f"{size_bytes / 1e6:.2g}"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def numbers(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in values.items())


class Bar:
    """Bytes done of a total, on the terminal; nothing where there is none."""

    def __init__(self, total_bytes: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total, self.done_bytes = total_bytes, 0
        self._began = self._shown = time.monotonic()

    def add(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        now = time.monotonic()
        if now - self._shown > 0.1 and self._stream.isatty():
            self._shown, share = now, min(1.0, self.done_bytes / max(self._total, 1))
            speed = self.done_bytes / 1e9 / (now - self._began)
            self._stream.write(f"\r[{'#' * int(40 * share):40}] {100 * share:3.0f} %  {speed:.2f} GB/s ")
            self._stream.flush()

    def close(self) -> float:
        """Clears the line; returns the seconds since the beginning."""
        if self._stream.isatty():
            self._stream.write("\r\033[K")
        return time.monotonic() - self._began
