"""The truth: the losses of logits, and in place their gradients.

With z the logits of a token, lse = log Σ exp z, y its target, V classes, ε the label smoothing and ζ the weight of z-loss:

    loss = (1 − ε)(lse − z_y) + ε (lse − mean z) + ζ lse²
    dz   = g (softmax(z)(1 + 2 ζ lse) − (1 − ε) δ_y − ε / V)

z-loss is that of PaLM (arXiv:2204.02311, section 5).
"""

import torch
from torch import Tensor

from engine_kernels.frozen_linear_cross_entropy.chunks import Columns, Options

ALIGN = 1


def cross_entropy_(z: Tensor, columns: Columns, target: Tensor, bias: Tensor | None, grad: Tensor | None, options: Options) -> Tensor:
    """See :data:`chunks.CrossEntropy`. Without padding only; every target is a class."""
    label_smoothing, z_loss = options.label_smoothing, options.z_loss
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
            full.sub_((grad * (label_smoothing / columns.classes)).unsqueeze(1))
        full.scatter_add_(1, target.unsqueeze(1), (grad * (label_smoothing - 1)).unsqueeze(1))
        if full is not z:
            z.copy_(full)
    return losses


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises IndexError. Waits for the device."""
    kept = target[target != ignore_index]
    if kept.numel() and not (int(kept.min()) >= 0 and int(kept.max()) < classes):
        raise IndexError(f"targets are from {int(kept.min())} to {int(kept.max())}; there are classes 0 to {classes - 1}, and ignore_index")
