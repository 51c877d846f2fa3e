"""The truth: copies into an image, and checksums as README.md defines them, in torch's int64, which wraps as unsigned integers do."""

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 1024 * 1024
"""What is worked on at once: a multiple of a word's 16 bytes."""

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
LOW_31_BITS = 2**31 - 1


def pack_checksum(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor | None) -> Tensor:
    """int64 [n]: the checksums of n contiguous ``sources``, which are copied to ``offsets`` [n] of ``image`` [bytes] (uint8) if there is one."""
    sums = []
    for i, source in enumerate(sources):
        data = source.reshape(-1).view(torch.uint8)
        total = at(torch.tensor(data.numel(), device=data.device))
        for begin in range(0, data.numel(), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            if image is not None:
                image[offsets[i] + begin :][: piece.numel()].copy_(piece)
            total += words_sum(piece, begin // 16)
        sums.append(total)
    return torch.stack(sums)


def words_sum(piece: Tensor, first: int) -> Tensor:
    """What the words of ``piece`` [bytes], the first of which is word ``first``, add to a checksum."""
    padded = piece.new_zeros(-(-piece.numel() // 16) * 16)
    padded[: piece.numel()] = piece
    lo, hi = padded.view(torch.int64).view(-1, 2).unbind(1)
    key = at(torch.arange(first, first + lo.numel(), device=piece.device)) | 1
    return (mix(lo ^ key) * key + mix(hi + key)).sum()


def at(position: Tensor) -> Tensor:
    return mix(position + GOLDEN)


def mix(x: Tensor) -> Tensor:
    for multiplier in MULTIPLIERS:
        x = (x ^ ((x >> 33) & LOW_31_BITS)) * multiplier
    return x ^ ((x >> 33) & LOW_31_BITS)
