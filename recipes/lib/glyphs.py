"""Real videos without a download: Unicode symbols drawn stroke by stroke, from matplotlib's own DejaVu Sans.

A video of U+2603 shows its outline growing frame by frame; its caption is "sketch of SNOWMAN".
"""

import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from matplotlib.path import Path as Outline
from torch import Tensor

CAPTION_PREFIX = "sketch of "
BLOCKS = ((0x2600, 0x2700), (0x2701, 0x27C0))  # Miscellaneous Symbols, Dingbats
POINTS = 512  # samples along a whole outline
MARGIN = 0.08  # of the picture, left free on each side


@cache
def _font() -> FT2Font:
    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"))
    font.set_size(64, 72)
    return font


@cache
def characters() -> tuple[str, ...]:
    """The symbols that have a name and an outline, in code point order."""
    present = _font().get_charmap()
    points = (code for first, end in BLOCKS for code in range(first, end))
    return tuple(chr(code) for code in points if code in present and unicodedata.name(chr(code), "") and _strokes(chr(code)))


def caption(character: str) -> str:
    return CAPTION_PREFIX + unicodedata.name(character)


def _strokes(character: str) -> list[np.ndarray]:
    """Polylines ``[points, 2]`` in font units, y upwards, curves already flattened."""
    font = _font()
    font.load_char(ord(character))
    vertices, codes = font.get_path()
    if not len(vertices):
        return []
    polylines = (np.asarray(s) for s in Outline(vertices, codes).to_polygons(closed_only=False))
    return [s for s in polylines if len(s) > 1]


def _trace(character: str) -> np.ndarray:
    """``POINTS`` points at equal steps along the outline, ``[POINTS, 2]`` as (row, column) in the unit square."""
    strokes = _strokes(character)
    lengths = np.array([np.linalg.norm(np.diff(s, axis=0), axis=1).sum() for s in strokes])
    ends = np.cumsum(lengths)
    at = (np.arange(POINTS) + 0.5) / POINTS * ends[-1]
    which = np.searchsorted(ends, at)
    points = np.empty((POINTS, 2))
    for index, stroke in enumerate(strokes):
        mine = which == index
        along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(stroke, axis=0), axis=1))])
        offset = at[mine] - (ends[index] - lengths[index])
        points[mine] = np.stack([np.interp(offset, along, stroke[:, axis]) for axis in (1, 0)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high - low).max() * (1 - 2 * MARGIN) + 0.5
    points[:, 0] = 1 - points[:, 0]
    return points


def drawing(character: str, frames: int, height: int, width: int) -> np.ndarray:
    """Float32 ``[frames, height, width]`` in [0, 1]: frame i shows the first (i+1)/frames of the outline."""
    points = _trace(character) * (height - 1, width - 1)
    corner = np.floor(points).astype(int)
    part = points - corner
    frame = np.arange(POINTS) * frames // POINTS
    ink = np.zeros((frames, height, width))
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
            row, column = np.minimum(corner[:, 0] + down, height - 1), np.minimum(corner[:, 1] + right, width - 1)
            np.add.at(ink, (frame, row, column), weight)
    return np.minimum(np.cumsum(ink, axis=0), 1.0).astype(np.float32)


@lru_cache(maxsize=1024)
def latent_video(character: str, frames: int, channels: int, height: int, width: int) -> Tensor:
    """The drawing as a latent ``[T, C, H, W]`` in [-1, 1]: each latent pixel holds a √C × √C patch of the picture.

    This takes the place of a video autoencoder: exact, and free of weights that would have to be downloaded. Kept in
    memory: not to be written to.
    """
    side = round(channels**0.5)
    if side * side != channels:
        raise ValueError(f"{channels} channels: a latent pixel holds a square patch, so their number must be a square")
    pictures = torch.from_numpy(drawing(character, frames, side * height, side * width))
    return torch.nn.functional.pixel_unshuffle(pictures[:, None], side) * 2 - 1
