"""Captions, one a line, and an embedding for them that needs no downloaded text encoder."""

from functools import lru_cache
from hashlib import shake_128
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import UsageError
from engine.format.checksum import digest
from engine.sync import Ranks
from recipes.lib import glyphs

GRAM = 3


@lru_cache(maxsize=8192)
def _gram_signs(gram: str, size: int) -> np.ndarray:
    bits = np.frombuffer(shake_128(gram.encode()).digest(-(-size // 8)), dtype=np.uint8)
    return np.unpackbits(bits)[:size] * 2.0 - 1


def embed(caption: str, tokens: int, size: int) -> Tensor:
    """Float32 ``[tokens, size]``: a vector a word, zeros after the last; words beyond ``tokens`` are dropped.

    A hash, not a language model: a word is the scaled sum of its character trigrams, each a vector of ±1 that SHAKE-128
    makes of it, so that words that share letters lie close and nothing else is known about them. It stands where a
    frozen text encoder's output would, with the same shape.
    """
    out = np.zeros((tokens, size), dtype=np.float32)
    for row, word in zip(out, caption.lower().split(), strict=False):
        marked = f"<{word}>"
        grams = [marked[i : i + GRAM] for i in range(len(marked) - GRAM + 1)]
        row[:] = sum(_gram_signs(gram, size) for gram in grams) / len(grams) ** 0.5
    return torch.from_numpy(out)


class Captions(Dataset[Tensor]):
    """Embedded captions ``[tokens, size]``, the whole list ``repeat`` times over."""

    def __init__(self, lines: list[str], tokens: int, size: int, repeat: int = 1) -> None:
        self.lines, self.tokens, self.size = lines * repeat, tokens, size

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Tensor:
        return self.embed(self.lines[index])

    def embed(self, caption: str) -> Tensor:
        return embed(caption, self.tokens, self.size)


def collate(embedded: list[Tensor]) -> Tensor:
    """``[B, tokens, size]``; empty on ranks for which the last batch of an epoch leaves nothing."""
    return torch.stack(embedded) if embedded else torch.empty(0)


def read_captions(path: Path | None) -> list[str]:
    """The file's lines without the empty ones; without a file, those of the built-in glyphs."""
    if path is None:
        return [glyphs.caption(c) for c in glyphs.characters()]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--data_path {path}: cannot be read as UTF-8 text, one caption a line: {e}") from e
    captions = [line for line in lines if line]
    if not captions:
        raise UsageError(f"--data_path {path}: no captions in it (one a line, empty lines do not count)")
    return captions


def read_captions_alike(path: Path | None, ranks: Ranks) -> list[str]:
    """:func:`read_captions` on every rank; other captions on one of them, or none, are every rank's error."""
    captions: list[str] = []

    def read() -> dict[str, bytes]:
        captions.extend(read_captions(path))
        return {"have other captions": digest("\n".join(captions).encode())}

    ranks.agree("read the captions", read)
    return captions
