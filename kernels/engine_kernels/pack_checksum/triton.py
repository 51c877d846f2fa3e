"""One launch for all sources: a program copies one piece and adds its part to the checksum of its source."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.pack_checksum.tables import PIECE_BYTES, tables


def pack_checksum(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor | None) -> Tensor:
    """As :func:`naive.pack_checksum`."""
    device = sources[0].device
    rows, owners = tables(sources, offsets, image, device)
    sums = torch.zeros(len(sources), dtype=torch.int64, device=device)
    _pack_checksum[(owners.numel(),)](rows, owners, sums, PIECE=PIECE_BYTES, WORDS=1024, SINGLE_WORDS=128, num_warps=8)
    return sums


@triton.jit
def _pack_checksum(rows, owners, sums, PIECE: tl.constexpr, WORDS: tl.constexpr, SINGLE_WORDS: tl.constexpr):
    """``WORDS`` of 16 bytes are moved at once where source and destination are aligned to them, else ``SINGLE_WORDS``, byte by byte."""
    piece = tl.program_id(0)
    owner = tl.load(owners + piece).to(tl.int64)
    row = rows + owner * 4
    from_, to, bytes_ = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    number = piece - tl.load(row + 3)
    word, end = number * (PIECE // 16), tl.minimum((number + 1) * PIECE, bytes_)
    total = tl.where(number == 0, _at(bytes_.to(tl.uint64)), 0)

    whole = tl.where((from_ | to) % 16 == 0, end // 16, word)  # the words before this one are moved as such
    while word < whole:
        index = word + tl.arange(0, WORDS)
        place = index[:, None] * 2 + tl.arange(0, 2)[None, :]
        halves = tl.load(tl.multiple_of(from_.to(tl.pointer_type(tl.int64)), 16) + place, mask=index[:, None] < whole, other=0)
        if to != 0:
            tl.store(tl.multiple_of(to.to(tl.pointer_type(tl.int64)), 16) + place, halves, mask=index[:, None] < whole)
        total += _sum(halves, index, index < whole)
        word += WORDS
    word = whole
    while word * 16 < end:
        index = word + tl.arange(0, SINGLE_WORDS)
        place = index[:, None, None] * 16 + tl.arange(0, 2)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        singles = tl.load(from_.to(tl.pointer_type(tl.uint8)) + place, mask=place < end, other=0)
        if to != 0:
            tl.store(to.to(tl.pointer_type(tl.uint8)) + place, singles, mask=place < end)
        halves = tl.sum(singles.to(tl.uint64) << (tl.arange(0, 8) * 8).to(tl.uint64)[None, None, :], axis=2)
        total += _sum(halves, index, index * 16 < end)
        word += SINGLE_WORDS
    tl.atomic_add(sums + owner, total.to(tl.int64, bitcast=True), sem="relaxed")  # integers: any order gives the same sum


@triton.jit
def _sum(halves, index, counts):
    """Of words [n, 2] at ``index`` [n], those that count."""
    lo, hi = tl.split(halves.to(tl.uint64, bitcast=True))
    key = _at(index.to(tl.uint64)) | 1
    return tl.sum(tl.where(counts, _mix(lo ^ key) * key + _mix(hi + key), 0))


@triton.jit
def _at(position):
    return _mix(position + 0x9E3779B97F4A7C15)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)
