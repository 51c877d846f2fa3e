"""Triton: one launch sets what is not trained to 0, and another scales the rest. A program works on one tile."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.intervals import addresses, by_dtype, gaps_of, tiles

_TILE = 4096


@triton.jit
def _multiply(tiles, tensors, scale, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Without a ``scale`` elements become 0 and are not read."""
    tile = tiles + 3 * tl.program_id(0)
    row = tensors + 2 * tl.load(tile)
    begin, end = tl.load(tile + 1), tl.load(tile + 2)
    if (end - begin == TILE) & (tl.load(row + 1) != 0):
        _write(row, begin, end, scale, DTYPE, True, TILE)
    else:
        _write(row, begin, end, scale, DTYPE, False, TILE)


@triton.jit
def _write(row, begin, end, scale, DTYPE: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """A ``WHOLE`` tile needs no mask, for with one elements are moved one by one."""
    grads = tl.load(row).to(tl.pointer_type(DTYPE))
    at = begin // TILE * TILE + tl.arange(0, TILE)
    inside = None
    if WHOLE:
        grads = tl.multiple_of(grads, 16)
    else:
        inside = (at >= begin) & (at < end)
    if scale is None:
        value = tl.zeros([TILE], tl.float32)
    else:
        value = tl.load(grads + at, mask=inside).to(tl.float32) * tl.load(scale).to(tl.float32)
    tl.store(grads + at, value.to(DTYPE), mask=inside)


def mask_scale_(grads: Sequence[Tensor], spans: Sequence[int], scale: Tensor | None) -> None:
    """As :func:`naive.mask_scale_`."""
    device = grads[0].device
    with torch.cuda.device_of(grads[0]):
        tensors = addresses([grads], device)
        parts = [(gaps_of(spans, [t.numel() for t in grads]), None), (spans if scale is not None else [], scale)]
        for own_spans, factor in parts:
            for (dtype,), own in by_dtype(own_spans, grads).items():
                table = tiles(own, _TILE, device)
                name = getattr(tl, str(dtype).removeprefix("torch."))
                _multiply[(len(table),)](table, tensors, factor, DTYPE=name, TILE=_TILE, num_warps=8)
