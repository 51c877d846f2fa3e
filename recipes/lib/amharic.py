"""Amharic without a download: what Babel's locale data say in it, and audio that is a function of the text.

2,668 (Babel 2.18) distinct short texts: names of languages, places, currencies and units, of months and days, and the dates of a year.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from hashlib import shake_128
from typing import Annotated, Any

import numpy as np
from babel.dates import format_date
from babel.localedata import LocaleDataDict, load
from msgspec import Meta, Struct

LOCALE = "am"
SECTIONS = (
    *("territories", "languages", "scripts", "time_zones", "meta_zones", "months", "days", "day_periods", "quarters", "eras", "date_fields"),
    *("currency_names", "currency_names_plural", "unit_display_names", "unit_patterns", "list_patterns", "measurement_systems"),
)
HOLES = {"{0}": "3", "{1}": "7"}  # what a pattern's places are filled with
YEAR = 2024  # a leap year
SPEAKERS = ("abebe", "almaz", "kebede", "tigist")
CODES_PER_CHARACTER = 2

Name = Annotated[str, Meta(min_length=1)]
Length = Annotated[int, Meta(ge=1)]


class Utterance(Struct, frozen=True, omit_defaults=True):
    """A manifest's line: what one speaker said, and its features as ``.npy`` files, relative to the manifest's folder.

    Text ids int32 ``[text_len]``, codes int32 ``[code_len]``, condition float32 ``[32, D]``, emotion float32 ``[D]``.
    """

    id: Name
    text: Name
    speaker: Name
    text_ids_path: Name | None = None
    codes_path: Name | None = None
    condition_path: Name | None = None
    emo_vec_path: Name | None = None
    text_len: Length | None = None
    code_len: Length | None = None


def texts() -> list[str]:
    """Distinct, mostly in Ethiopic script, without double spaces, in code point order."""
    data: Any = load(LOCALE)
    locale = LocaleDataDict(data)
    found = [re.sub(r"\{\d\}", lambda hole: HOLES[hole[0]], text) for section in SECTIONS for text in _strings(locale[section])]
    found += [format_date(date(YEAR, 1, 1) + timedelta(days=day), "full", locale=LOCALE) for day in range(366)]
    return sorted({" ".join(text.split()) for text in found if ethiopic_share(text) > 0.5})


def _strings(data: Any) -> Iterator[str]:
    """All in nested mappings. By their keys: Babel follows an alias when it is asked for one, and from then on has what it stands for."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key in data:
            yield from _strings(data[key])


def ethiopic_share(text: str) -> float:
    """Which part of the letters is Ethiopic, 0 to 1; 0 without letters. Other languages than Amharic are written in it too."""
    letters = [c for c in text if unicodedata.category(c).startswith("L")]
    return sum(unicodedata.name(c, "").startswith("ETHIOPIC") for c in letters) / max(1, len(letters))


def codes(text: str, count: int) -> np.ndarray:
    """Int32 ``[code_len]``, 0 to ``count`` − 1: each character always sounds alike, so that a model can learn codes from text."""
    spoken = b"".join(shake_128(character.encode()).digest(4 * CODES_PER_CHARACTER) for character in text)
    return (np.frombuffer(spoken, dtype="<u4") % count).astype(np.int32)


def condition(speaker: str, text: str, rows: int, width: int) -> np.ndarray:
    """Float32 ``[rows, width]``: what a prompt's audio would be encoded to. Half of it is the speaker's, half the text's."""
    return (_signs(f"speaker {speaker}", rows * width) + _signs(text, rows * width)).reshape(rows, width) / 2


def emotion(text: str, width: int) -> np.ndarray:
    """Float32 ``[width]``."""
    return _signs(f"emotion {text}", width)


def _signs(text: str, size: int) -> np.ndarray:
    """Float32 ``[size]`` of ±1 that SHAKE-128 makes of the text: the same on every machine."""
    bits = np.unpackbits(np.frombuffer(shake_128(text.encode()).digest(-(-size // 8)), dtype=np.uint8))
    return bits[:size].astype(np.float32) * 2 - 1
