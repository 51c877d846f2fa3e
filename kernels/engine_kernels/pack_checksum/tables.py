"""What one launch works on: sources of any size, cut into pieces of one size."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine_kernels.device import upload

PIECE_BYTES = 32 * 1024
"""What one block works on: a multiple of a word's 16 bytes."""


def tables(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tables on ``device``. Of the sources, int64 [n, 4]: address, address of the destination (0: none), bytes, number of the first piece.
    Of the pieces, int32 [pieces]: the source of each. An empty source has one piece, for its length is part of its checksum."""
    bytes_ = _column(source.nbytes for source in sources)
    pieces = (bytes_.clamp(min=1) + PIECE_BYTES - 1) // PIECE_BYTES
    froms = _column(source.data_ptr() for source in sources)
    tos = torch.zeros_like(froms) if image is None else _column(offsets) + image.data_ptr()
    rows = torch.stack([froms, tos, bytes_, pieces.cumsum(0) - pieces], dim=1)
    owners = torch.repeat_interleave(pieces).int()
    return upload(rows, device), upload(owners, device)


def _column(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
