"""Text from a checkpoint as it is shown: nothing in it steers a terminal, reorders a line or passes
for a line of its own.

Applied where text leaves the engine, not where it comes from: in the messages of its errors, in its
log, and by what its command prints (``engine.cli.text.say``).
"""

import logging
import re

_BREAK = re.compile(r"\n(?!  )")


def printable(text: str) -> str:
    """Return ``text`` with all escaped that is not printable: control characters, line breaks,
    marks of direction, characters without width, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def indented(text: str) -> str:
    """Return ``text`` as :func:`printable` does, but with its line breaks, each of which an indent
    follows."""
    return "\n".join(map(printable, _BREAK.sub("\n  ", text).split("\n")))


def escape_log() -> None:
    """Let everything that the engine logs be as :func:`indented` returns it, but for the formats,
    which are its own."""
    logging.getLogger("engine").addFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        quoted = (str, Exception)
        record.args = tuple(indented(str(a)) if isinstance(a, quoted) else a for a in record.args)
    return True
