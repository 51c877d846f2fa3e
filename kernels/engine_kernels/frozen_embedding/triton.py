"""Triton: rows gathered from two tables, and the gradient of the second one.

The gradient is a segmented sum in two levels: tokens are sorted by row, stably; rows with many tokens are cut into pieces, summed by as
many programs. Every sum is in one order, there are no atomics, and each element of the result is written once. All sizes follow from the
shapes, so that nothing waits for the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 32
"""Tokens of one row that one program sums."""
_AT_ONCE = 8
"""Tokens that are loaded together."""


@triton.jit
def _gather(ids, frozen, trainable, out, base, rows, width, frozen_stride, trainable_stride, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token).to(tl.int64)
    inside = columns < width
    if row < base:
        values = tl.load(frozen + row * frozen_stride + columns, mask=inside & (row >= 0), other=float("nan"))
    else:
        values = tl.load(trainable + (row - base) * trainable_stride + columns, mask=inside & (row < rows), other=float("nan"))
    tl.store(out + token * width + columns, values, mask=inside)


@triton.jit
def _sum_of(
    source, order, begin, end, columns, width, stride, BY_ORDER: tl.constexpr, WIDE: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows ``order[begin:end]`` of source, or ``begin:end`` themselves."""
    total = tl.zeros([BLOCK], WIDE)
    for first in range(begin, end, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        inside = place < end
        row = place.to(tl.int64)
        if BY_ORDER:
            row = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        values = tl.load(source + row[:, None] * stride + columns[None, :], mask=inside[:, None] & (columns < width)[None, :], other=0.0)
        total += tl.sum(values.to(WIDE), axis=0)
    return total


@triton.jit
def _sum_pieces(
    grad, order, starts, pieces, owners, sums, rows, width, stride,
    PIECE: tl.constexpr, AT_ONCE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(owners + piece)
    if row < rows:
        begin = tl.load(starts + row) + (piece - tl.load(pieces + row)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(starts + row + 1))
        total = _sum_of(grad, order, begin, end, columns, width, stride, True, WIDE, AT_ONCE, BLOCK)
        tl.store(sums + piece.to(tl.int64) * width + columns, total, mask=columns < width)


@triton.jit
def _sum_rows(
    grad, order, starts, pieces, sums, out, width, stride, AT_ONCE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(pieces + row), tl.load(pieces + row + 1)
    if first == last:
        total = _sum_of(grad, order, tl.load(starts + row), tl.load(starts + row + 1), columns, width, stride, True, WIDE, AT_ONCE, BLOCK)
    else:
        total = _sum_of(sums, order, first, last, columns, width, width, False, WIDE, AT_ONCE, BLOCK)
    tl.store(out + row.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


def forward(ids: Tensor, frozen: Tensor, trainable: Tensor) -> Tensor:
    """As :func:`naive.forward`; an id out of range gives a row of NaN."""
    width, base = trainable.shape[1], frozen.shape[0]
    frozen, trainable = _dense_rows(frozen), _dense_rows(trainable)
    out = trainable.new_empty(*ids.shape, width)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        _gather[(ids.numel(), triton.cdiv(width, block))](
            ids.reshape(-1), frozen, trainable, out, base, base + trainable.shape[0], width, frozen.stride(0), trainable.stride(0), BLOCK=block
        )
    return out


def backward(grad: Tensor, ids: Tensor, base: int, rows: int, padding_idx: int) -> Tensor:
    """As :func:`naive.backward`."""
    width = grad.shape[-1]
    out = grad.new_empty(rows, width)
    if not out.numel():
        return out
    grad, plan = _dense_rows(grad.reshape(-1, width)), _plan(ids.reshape(-1), base, rows, padding_idx)
    wide = tl.float64 if grad.dtype == torch.float64 else tl.float32
    count = plan.owners.shape[0]
    sums = grad.new_empty(count, width, dtype=torch.promote_types(grad.dtype, torch.float32))
    block = min(512, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    common = {"AT_ONCE": _AT_ONCE, "WIDE": wide, "BLOCK": block}
    _sum_pieces[(count, blocks)](grad, plan.order, plan.starts, plan.pieces, plan.owners, sums, rows, width, grad.stride(0), PIECE=_PIECE, **common)
    _sum_rows[(rows, blocks)](grad, plan.order, plan.starts, plan.pieces, sums, out, width, grad.stride(0), **common)
    return out


@dataclass(frozen=True)
class _Plan:
    """All int32. ``order`` [N]: tokens by row, and by position within a row; ``starts`` [rows + 1]: where each row's begin; ``pieces``
    [rows + 1]: where the pieces of rows with more than _PIECE tokens begin; ``owners``: of each piece its row, or ``rows`` where there
    are fewer pieces."""

    order: Tensor
    starts: Tensor
    pieces: Tensor
    owners: Tensor


def _plan(ids: Tensor, base: int, rows: int, padding_idx: int) -> _Plan:
    row = torch.where((ids >= base) & (ids < base + rows), ids - base, rows)  # those that get nothing come last
    if padding_idx >= base:
        row = torch.where(ids == padding_idx, rows, row)
    row, order = torch.sort(row.to(torch.int32), stable=True)
    starts = torch.searchsorted(row, torch.arange(rows + 1, device=ids.device, dtype=torch.int32), out_int32=True)
    counts = starts.diff()
    many = torch.where(counts > _PIECE, (counts + _PIECE - 1) // _PIECE, 0)
    ends = many.cumsum(0, dtype=torch.int32)
    most = 2 * (ids.numel() // _PIECE) + 1  # c > p tokens make at most c / p + 1 < 2 c / p pieces
    owners = torch.searchsorted(ends, torch.arange(most, device=ids.device, dtype=torch.int32), right=True, out_int32=True)
    return _Plan(order.to(torch.int32), starts, torch.cat([ends.new_zeros(1), ends]), owners)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or not tensor.numel() else tensor.contiguous()
