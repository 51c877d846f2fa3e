"""The truth: a head over ``[frozen; trainable]`` rows with its cross-entropy, some tokens at a time, so that the logits are never whole.

With z the logits of a token, lse = log Σ exp z, y its target, V classes, ε the label smoothing and ζ the weight of z-loss:

    loss = (1 − ε)(lse − z_y) + ε (lse − mean z) + ζ lse²
    dz   = g (softmax(z)(1 + 2 ζ lse) − (1 − ε) δ_y − ε / V)

z-loss is that of PaLM (arXiv:2204.02311, section 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk: int,
    fp32_logits: bool,
    wants: tuple[bool, bool, bool],
) -> Found:
    """``x`` [N, D] and ``target`` [N] (int64) with ``frozen`` [base, D], ``trainable`` [R, D] and ``bias`` [base + R].

    ``grad`` [N]: the gradient of each token's loss; None: none is wanted. ``wants``: those of x, the trainable weight and bias. Sums are in
    fp32 at least. Tokens with ``ignore_index`` cost nothing: loss and gradient are 0. Raises IndexError for another target that is no class.
    """
    total, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    classes, base = frozen.shape[0] + trainable.shape[0], frozen.shape[0]
    kept = (target != ignore_index).nonzero().squeeze(1)
    check_targets(target[kept], classes)
    if kept.numel() < total:
        part = run(
            x[kept], frozen, trainable, target[kept], bias, None if grad is None else grad[kept],
            ignore_index, label_smoothing, z_loss, chunk, fp32_logits, wants,
        )  # fmt: skip
        part.losses = part.losses.new_zeros(total).index_copy_(0, kept, part.losses)
        part.x = None if part.x is None else torch.zeros_like(x).index_copy_(0, kept, part.x)
        return part
    found = Found(x.new_empty(total, dtype=wide))
    if grad is not None and wants[0]:
        found.x = torch.empty_like(x)
    if grad is not None and wants[1]:
        found.weight = trainable.new_zeros(trainable.shape, dtype=wide)
    if grad is not None and wants[2]:
        found.bias = trainable.new_zeros(trainable.shape[0], dtype=wide)
    logits_dtype = wide if fp32_logits else x.dtype
    rows = frozen.to(logits_dtype), trainable.to(logits_dtype)
    buffer = x.new_empty(min(chunk, total), classes, dtype=logits_dtype)
    for begin in range(0, total, chunk):
        inputs = x[begin : begin + chunk]
        z = buffer[: inputs.shape[0]]
        torch.mm(inputs.to(logits_dtype), rows[0].t(), out=z[:, :base])
        torch.mm(inputs.to(logits_dtype), rows[1].t(), out=z[:, base:])
        g = None if grad is None else grad[begin : begin + chunk].to(wide)
        found.losses[begin : begin + chunk] = cross_entropy_(z, target[begin : begin + chunk], bias, g, label_smoothing, z_loss)
        if found.x is not None:
            torch.mm(z[:, :base].to(x.dtype), frozen, out=found.x[begin : begin + chunk])
            found.x[begin : begin + chunk].addmm_(z[:, base:].to(x.dtype), trainable)
        if found.weight is not None:
            found.weight.addmm_(z[:, base:].t().to(wide), inputs.to(wide))
        if found.bias is not None:
            found.bias += z[:, base:].sum(0, dtype=wide)
    return found


def cross_entropy_(z: Tensor, target: Tensor, bias: Tensor | None, grad: Tensor | None, label_smoothing: float, z_loss: float) -> Tensor:
    """The losses [n] of logits ``z`` [n, V], which become their gradients where ``grad`` [n] is given, or are lost."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if bias is not None:
        z += bias
    full = z.to(wide)  # itself where it is wide enough
    own = full.gather(1, target.unsqueeze(1)).squeeze(1)
    mean = full.mean(1) if label_smoothing else None
    largest = full.amax(1, keepdim=True)
    total = full.sub_(largest).exp_().sum(1, keepdim=True)
    lse = (largest + total.log()).squeeze(1)
    losses = (1 - label_smoothing) * (lse - own) + z_loss * lse * lse
    if mean is not None:
        losses = losses + label_smoothing * (lse - mean)
    if grad is not None:
        full.mul_((grad * (1 + 2 * z_loss * lse)).unsqueeze(1) / total)
        if label_smoothing:
            full.sub_((grad * (label_smoothing / z.shape[1])).unsqueeze(1))
        full.scatter_add_(1, target.unsqueeze(1), (grad * (label_smoothing - 1)).unsqueeze(1))
        if full is not z:
            z.copy_(full)
    return losses


def check_targets(target: Tensor, classes: int) -> None:
    """Raises IndexError. Waits for the device."""
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < classes):
        raise IndexError(f"targets are from {int(target.min())} to {int(target.max())}; there are classes 0 to {classes - 1}, and ignore_index")
