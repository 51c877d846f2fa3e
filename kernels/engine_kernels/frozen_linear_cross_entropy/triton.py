"""Triton: the losses of logits and in place their gradients, one program a token.

A row that fits the registers is read once, a longer one twice but for its first block. Loads are masked by the padded width only, so that
they stay vectors for any vocabulary; what is a class is chosen afterwards. Sums are in fp32 at least, in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.frozen_linear_cross_entropy.chunks import Columns, Options

ALIGN = 64
_WHOLE = 16 * 1024
"""The widest row that is kept in the registers of one program."""
_BLOCK = 8192


@triton.jit
def _load(z, bias, column, base, first, rows, width, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr):
    """The logits at ``column``, whether they are classes, and which."""
    x = tl.load(z + column, mask=column < width, other=0.0).to(WIDE)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < width, other=0.0).to(WIDE)
    is_frozen = column < base
    is_class = is_frozen | ((column >= first) & (column < first + rows))
    return x, is_class, tl.where(is_frozen, column, column - (first - base))


@triton.jit
def _fold(x, is_class, of, target, largest, total, mean, own):
    """The running maximum, sum of exponentials below it, sum, and the target's logit, with some more logits."""
    mean += tl.sum(tl.where(is_class, x, 0.0))
    own += tl.sum(tl.where(is_class & (of == target), x, 0.0))
    x = tl.where(is_class, x, -float("inf"))
    now = tl.maximum(largest, tl.max(x))
    shift = tl.where(now == -float("inf"), 0.0, now)
    return now, total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift)), mean, own


@triton.jit
def _store_gradient(z, column, x, is_class, of, target, lse, g, is_ignored, smoothing, z_loss, classes, width):
    d = g * (1.0 + 2.0 * z_loss * lse) * tl.exp(x - lse) - g * smoothing / classes
    d -= tl.where(of == target, g * (1.0 - smoothing), 0.0)
    d = tl.where(is_class & (not is_ignored), d, 0.0)
    tl.store(z + column, d.to(z.dtype.element_ty), mask=column < width)


@triton.jit
def _cross_entropy(
    z, targets, bias, grads, losses, stride, base, first, rows, width, ignore_index, smoothing, z_loss,
    HAS_BIAS: tl.constexpr, HAS_GRAD: tl.constexpr, IS_WHOLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    z += token * stride
    smoothing, z_loss = tl.cast(smoothing, WIDE), tl.cast(z_loss, WIDE)
    target = tl.load(targets + token)
    is_ignored, classes = target == ignore_index, base + rows
    columns = tl.arange(0, BLOCK)
    largest, zero = tl.cast(-float("inf"), WIDE), tl.cast(0.0, WIDE)
    total, mean, own = zero, zero, zero
    x, is_class, of = _load(z, bias, columns, base, first, rows, width, HAS_BIAS, WIDE)
    largest, total, mean, own = _fold(x, is_class, of, target, largest, total, mean, own)
    if not IS_WHOLE:
        for begin in range(BLOCK, width, BLOCK):
            y, is_y, of_y = _load(z, bias, begin + columns, base, first, rows, width, HAS_BIAS, WIDE)
            largest, total, mean, own = _fold(y, is_y, of_y, target, largest, total, mean, own)
    lse = largest + tl.log(total)
    loss = (1.0 - smoothing) * (lse - own) + smoothing * (lse - mean / classes) + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < classes), loss, float("nan"))
    tl.store(losses + token, tl.where(is_ignored, 0.0, loss))
    if HAS_GRAD:
        g = tl.load(grads + token).to(WIDE)
        _store_gradient(z, columns, x, is_class, of, target, lse, g, is_ignored, smoothing, z_loss, classes, width)
        if not IS_WHOLE:
            for begin in range(BLOCK, width, BLOCK):
                column = begin + columns
                y, is_y, of_y = _load(z, bias, column, base, first, rows, width, HAS_BIAS, WIDE)
                _store_gradient(z, column, y, is_y, of_y, target, lse, g, is_ignored, smoothing, z_loss, classes, width)


def cross_entropy_(z: Tensor, columns: Columns, target: Tensor, bias: Tensor | None, grad: Tensor | None, options: Options) -> Tensor:
    """See :data:`chunks.CrossEntropy`. An ignored token's loss and gradient are 0; the loss is NaN for another target that is no class."""
    losses = z.new_empty(z.shape[0], dtype=torch.promote_types(z.dtype, torch.float32))
    if not z.numel():
        return losses
    is_whole = columns.width <= _WHOLE
    block = triton.next_power_of_2(columns.width) if is_whole else _BLOCK
    _cross_entropy[(z.shape[0],)](
        z, target.contiguous(), z if bias is None else bias, losses if grad is None else grad.contiguous(), losses, z.stride(0),
        columns.base, columns.first, columns.rows, columns.width, options.ignore_index, options.label_smoothing, options.z_loss,
        HAS_BIAS=bias is not None, HAS_GRAD=grad is not None, IS_WHOLE=is_whole, WIDE=tl.float64 if z.dtype == torch.float64 else tl.float32,
        BLOCK=block, num_warps=min(32, max(4, block // 512)),
    )  # fmt: skip
    return losses
