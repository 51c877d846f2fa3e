"""Options of the public functions, checked when they are given: a word that is not known is refused with the words there are."""

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from engine.errors import UsageError

_PLAIN = (str, bytes, bool, int, float, list, dict, set, frozenset)


def one_of(name: str, value: Any, choices: Any) -> None:
    """Check a word. ``choices``: a ``Literal`` type."""
    words = get_args(choices)
    if not any(value is word or (type(value) is type(word) and value == word) for word in words):
        raise UsageError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, words))}{_hint(value, words)}")


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least ``least``, of whatever integer type it came."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UsageError(f"{name}={value!r}: give a whole number of at least {least}")
    return number


def seconds(name: str, value: Any) -> float:
    """Return a positive number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UsageError(f"{name}={value!r}: give a positive number of seconds")
    return float(value)


def words(name: str, value: Any) -> tuple[str, ...]:
    """Return a list of names or patterns. A single text, whose letters would be taken for them, is refused."""
    given = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if given is None or not all(isinstance(word, str) for word in given):
        raise UsageError(f"{name}={value!r}: give a list of texts" + (f", {name}=[{value!r}]" if isinstance(value, str) else ""))
    return given


def not_plain(name: str, value: Any, options: Sequence[str]) -> None:
    """Check that what was given by a keyword that is not an option can be a member: plain values have no state."""
    if value is None or isinstance(value, _PLAIN) or (callable(value) and not hasattr(value, "state_dict")):
        raise UsageError(
            f"{name}={value!r} is neither an option nor a member ({type(value).__name__} has no state){_hint(name, options)}. "
            f"The options are {', '.join(options)}; a member is a DeepSpeed engine, a module, a tuple (module, optimizer[, scheduler]), or an "
            "object with state_dict and load_state_dict"
        )


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Return a mapping from texts as a dict; None is empty."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name} is a {type(value).__name__}; give a mapping from texts to plain values")
    return dict(value)


def local_path(name: str, value: str) -> str:
    """Return a path of this machine's file system. A URL would silently become a folder of that name."""
    if not value.strip():
        raise UsageError(f"{name} is empty; give a path")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", value):
        raise UsageError(
            f"{name} is {value!r}, and {scheme[1]}:// is not a storage that is known here; give a path, such as that of a shared file system"
        )
    return value


def _hint(value: Any, known: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(value), [str(word) for word in known], 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
