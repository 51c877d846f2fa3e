"""Triton: the sum of squares in two stages, each in one order: a program sums one tile of one interval, and torch sums those sums."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.intervals import addresses, by_dtype, tiles

_TILE = 8192


@triton.jit
def _squares(tiles, tensors, sums, DTYPE: tl.constexpr, TILE: tl.constexpr):
    tile = tiles + 3 * tl.program_id(0)
    row = tensors + 2 * tl.load(tile)
    begin, end = tl.load(tile + 1), tl.load(tile + 2)
    if (end - begin == TILE) & (tl.load(row + 1) != 0):
        total = _sum(row, begin, end, DTYPE, True, TILE)
    else:
        total = _sum(row, begin, end, DTYPE, False, TILE)
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def _sum(row, begin, end, DTYPE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """A ``WHOLE`` tile needs no mask, for with one elements are loaded one by one."""
    grads = tl.load(row).to(tl.pointer_type(DTYPE))
    at = begin // TILE * TILE + tl.arange(0, TILE)
    if WHOLE:
        grad = tl.load(tl.multiple_of(grads, 16) + at)
    else:
        grad = tl.load(grads + at, mask=(at >= begin) & (at < end), other=0.0)
    grad = grad.to(tl.float32)
    return tl.sum(grad * grad)


def sum_of_squares(grads: Sequence[Tensor], spans: Sequence[int]) -> Tensor:
    """As :func:`naive.sum_of_squares`."""
    device = grads[0].device
    with torch.cuda.device_of(grads[0]):
        tensors = addresses([grads], device)
        tables = {dtype: tiles(own, _TILE, device) for (dtype,), own in by_dtype(spans, grads).items()}
        sums = torch.empty(sum(map(len, tables.values())), device=device)
        done = 0
        for dtype, table in tables.items():
            name = getattr(tl, str(dtype).removeprefix("torch."))
            _squares[(len(table),)](table, tensors, sums[done:], DTYPE=name, TILE=_TILE, num_warps=8)
            done += len(table)
    return sums.sum()
