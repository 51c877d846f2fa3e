"""The head some tokens at a time, so that the logits are never whole: matrix products by torch, the cross-entropy by the function given."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_kernels.frozen_linear_cross_entropy.columns import Columns


@dataclass(frozen=True)
class Options:
    """As :func:`~engine_kernels.frozen_linear_cross_entropy.frozen_linear_cross_entropy` explains them. ``chunk``: tokens at a time;
    ``valid``: how many tokens are not ignored, -1 where only the device knows."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    chunk: int
    fp32_logits: bool
    valid: int


CrossEntropy = Callable[[Tensor, Columns, Tensor, Tensor | None, Tensor | None, Options], Tensor]
"""``(z, columns, target, bias, grad, options) -> losses`` [n] of logits ``z`` [n, columns.width], which become their gradients where ``grad``
[n] is given, or are lost. ``bias`` [columns.width]."""


@dataclass
class Found:
    """``losses`` [N]; and those of the gradients that were asked for, else None: ``x`` [N, D], ``weight`` [R, D], ``bias`` [R]."""

    losses: Tensor
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def run(
    x: Tensor,
    frozen: Tensor,
    trainable: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    options: Options,
    wants: tuple[bool, bool, bool],
    cross_entropy_: CrossEntropy,
    align: int,
) -> Found:
    """``x`` [N, D] and ``target`` [N] (int64) with ``frozen`` [base, D], ``trainable`` [R, D] and ``bias`` [base + R].

    ``grad`` [N]: the gradient of each token's loss; None: none is wanted. ``wants``: those of x, the trainable weight and bias. Sums are in
    fp32 at least. Tokens with ``ignore_index`` are left out before anything is computed: loss and gradient are 0. Where more tokens than
    ``valid`` are not ignored, losses are NaN.
    """
    chosen, total = target != options.ignore_index, x.shape[0]
    if options.valid < 0:
        kept = chosen.nonzero().squeeze(1)  # waits for the device
        goals, count = target[kept], kept.numel()
    else:
        count = min(options.valid, total)  # nothing waits
        kept = torch.nonzero_static(chosen, size=count, fill_value=-1).squeeze(1)
        missing = kept < 0
        kept = kept.clamp(min=0)
        goals = torch.where(missing, options.ignore_index, target[kept])
    if count == total:
        return _run(x, frozen, trainable, target, bias, grad, options, wants, cross_entropy_, align)
    inputs = x[kept]
    if options.valid >= 0:
        inputs.masked_fill_(missing.unsqueeze(1), 0)
    found = _run(inputs, frozen, trainable, goals, bias, None if grad is None else grad[kept], options, wants, cross_entropy_, align)
    found.losses = found.losses.new_zeros(total).index_add_(0, kept, found.losses)
    found.x = None if found.x is None else torch.zeros_like(x).index_add_(0, kept, found.x)
    if options.valid >= 0:
        found.losses = torch.where(chosen.sum() > count, torch.nan, found.losses)
    return found


def _run(
    x: Tensor,
    frozen: Tensor,
    trainable: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    options: Options,
    wants: tuple[bool, bool, bool],
    cross_entropy_: CrossEntropy,
    align: int,
) -> Found:
    total, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    columns = Columns(frozen.shape[0], trainable.shape[0], align)
    found = Found(x.new_empty(total, dtype=wide))
    if grad is not None and wants[0]:
        found.x = torch.empty_like(x)
    if grad is not None and wants[1]:
        found.weight = trainable.new_zeros(trainable.shape, dtype=wide)
    if grad is not None and wants[2]:
        found.bias = trainable.new_zeros(trainable.shape[0], dtype=wide)
    bias = None if bias is None else columns.spread(bias)
    buffer = x.new_empty(min(options.chunk, total), columns.width, dtype=wide if options.fp32_logits else x.dtype)
    for begin in range(0, total, options.chunk):
        part = slice(begin, begin + options.chunk)
        inputs = x[part]
        z = buffer[: inputs.shape[0]]
        _multiply(inputs, frozen.t(), columns.frozen(z))
        _multiply(inputs, trainable.t(), columns.trainable(z))
        g = None if grad is None else grad[part].to(wide)
        found.losses[part] = cross_entropy_(z, columns, target[part], bias, g, options)
        if found.x is not None:
            _multiply(columns.frozen(z), frozen, found.x[part])
            _multiply(columns.trainable(z), trainable, found.x[part], add=True)
        if found.weight is not None:
            _multiply(columns.trainable(z).t(), inputs, found.weight, add=True)
        if found.bias is not None:
            found.bias += columns.trainable(z).sum(0, dtype=wide)
    return found


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out (+)= a @ b``. The CPU computes in out's dtype; CUDA's tensor cores take b's and sum in out's."""
    kind = b.dtype if out.is_cuda else out.dtype
    a, b = a.to(kind), b.to(kind)
    if kind == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
