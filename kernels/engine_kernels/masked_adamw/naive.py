"""The truth: AdamW (arXiv:1711.05101) on the trained elements only."""

from collections.abc import Sequence

from torch import Tensor

from engine_kernels.intervals import triples


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
    """In place, in the dtype of ``params``. ``copies`` may be empty.

    ``factors``: fp64 [5]: what decay leaves, 1 − lr λ; the size of the step, lr / (1 − β₁ᵗ); 1 / √(1 − β₂ᵗ); the scale of the gradients; and
    whether nothing is to be done (not 0).
    """
    decay, size, correction, scale, skip = factors.tolist()
    if skip:
        return
    for i, begin, end in triples(spans):
        param, grad, exp_avg, exp_avg_sq = (tensors[i].view(-1)[begin:end] for tensors in (params, grads, exp_avgs, exp_avg_sqs))
        grad = grad.to(param.dtype) * scale
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.mul_(decay).addcdiv_(exp_avg, exp_avg_sq.sqrt().mul_(correction).add_(eps), value=-size)
        if copies:
            copies[i].view(-1)[begin:end].copy_(param)
