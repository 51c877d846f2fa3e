"""Triton: one launch for all tensors of like dtypes. A program works on one tile of one interval."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.intervals import addresses, by_dtype, tiles

_TILE, _WARPS = 1024, 8
"""Four elements a thread: with eight, registers leave room for few threads."""


@triton.jit
def _step(
    tiles, tensors, factors, beta1, rest1, beta2, rest2, eps, COLUMNS: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """``rest1`` and ``rest2``: 1 - beta1 and 1 - beta2, which lose digits where they are computed in fp32."""
    tile = tiles + 3 * tl.program_id(0)
    row = tensors + COLUMNS * tl.load(tile)
    begin, end = tl.load(tile + 1), tl.load(tile + 2)
    is_aligned = tl.load(row + COLUMNS - 1)
    decay, size, correction = _float(tl.load(factors)), _float(tl.load(factors + 1)), _float(tl.load(factors + 2))
    scale, skip = _float(tl.load(factors + 3)), tl.load(factors + 4)
    if skip == 0:
        if (end - begin == TILE) & (is_aligned != 0):
            _update(row, begin, end, decay, size, correction, scale, beta1, rest1, beta2, rest2, eps, GRAD, COPY, True, TILE)
        else:
            _update(row, begin, end, decay, size, correction, scale, beta1, rest1, beta2, rest2, eps, GRAD, COPY, False, TILE)


@triton.jit
def _update(
    row, begin, end, decay, size, correction, scale, beta1, rest1, beta2, rest2, eps,
    GRAD: tl.constexpr, COPY: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A ``WHOLE`` tile needs no mask, for with one elements are loaded one by one."""
    at = begin // TILE * TILE + tl.arange(0, TILE)
    inside = None
    if not WHOLE:
        inside = (at >= begin) & (at < end)
    params = _pointer(row, tl.float32, WHOLE) + at
    grads = _pointer(row + 1, GRAD, WHOLE) + at
    exp_avgs = _pointer(row + 2, tl.float32, WHOLE) + at
    exp_avg_sqs = _pointer(row + 3, tl.float32, WHOLE) + at
    grad = tl.load(grads, mask=inside).to(tl.float32) * scale
    exp_avg = tl.load(exp_avgs, mask=inside)
    exp_avg += _float(rest1) * (grad - exp_avg)
    exp_avg_sq = _float(beta2) * tl.load(exp_avg_sqs, mask=inside) + _float(rest2) * grad * grad
    param = tl.load(params, mask=inside) * decay - size * exp_avg / (tl.sqrt(exp_avg_sq) * correction + _float(eps))
    tl.store(params, param, mask=inside)
    tl.store(exp_avgs, exp_avg, mask=inside)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=inside)
    if COPY is not None:
        tl.store(_pointer(row + 4, COPY, WHOLE) + at, param.to(COPY), mask=inside)


@triton.jit
def _pointer(place, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(place).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _float(number):
    return tl.cast(number, tl.float32)


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    spans: Sequence[int],
    factors: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As :func:`naive.step`, in fp32."""
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])]
    device = factors.device
    with torch.cuda.device_of(factors):
        tensors = addresses(lists, device)
        for (grad, *copy), own in by_dtype(spans, grads, *lists[4:]).items():
            table = tiles(own, _TILE, device)
            _step[(len(table),)](
                table, tensors, factors, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                COLUMNS=tensors.shape[1], GRAD=_name(grad), COPY=_name(copy[0]) if copy else None, TILE=_TILE, num_warps=_WARPS,
            )  # fmt: skip


def _name(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
