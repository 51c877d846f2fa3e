"""``lockstep::masked_adamw``: plain torch on the CPU, Triton on CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_kernels.device import uses_triton
from engine_kernels.intervals import Intervals, check_scalar, check_tensors, spans_of
from engine_kernels.masked_adamw import naive


@torch.library.custom_op("lockstep::masked_adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def _step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], copies: Sequence[Tensor],
    spans: Sequence[int], factors: Tensor, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    if uses_triton(factors):
        from engine_kernels.masked_adamw import triton as kernels
    else:
        kernels = naive
    kernels.step(params, grads, exp_avgs, exp_avg_sqs, copies, spans, factors, beta1, beta2, eps)


@_step.register_fake
def _(*_: object) -> None:
    pass


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    intervals: Sequence[Intervals],
    step: Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of :class:`torch.optim.AdamW`, in place, on the trained elements. The others are neither read nor written.

    Args:
        params: contiguous fp32 tensors of any shapes, or fp64 on the CPU.
        grads: of fp32, bf16 or fp16, or the dtype of the parameter; each of its parameter's shape, as all lists.
        exp_avgs, exp_avg_sqs: the moments, of the parameter's dtype.
        intervals: what is trained of each tensor, looked at flat: sorted, disjoint (begin, end), in elements.
        step: the number of this step, counted from 1: a 0-d tensor of any dtype on the device of the parameters, as all tensors here.
        copies: fp32, bf16 or fp16; they get the new parameters, rounded.
        lr: a float or a 0-d tensor. betas, eps, weight_decay: as in AdamW.
        scale: 0-d; the gradients are multiplied by it: 1 / loss scale x clip factor, as :func:`masked_norm` gives it.
        found_inf: 0-d; if it is not 0, nothing is written.

    Never waits for the device. On CUDA there is one launch for each pair of dtypes of gradient and copy. Its tables stay on the device while
    addresses and intervals do, so a CUDA graph is captured after a first step outside it. Raises ValueError where anything does not fit.
    """
    given = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    check_tensors(given if copies is None else {**given, "copies": copies})
    spans = spans_of(intervals, [t.numel() for t in params])
    for i, param in enumerate(params):
        _check_dtypes(i, param, grads[i], exp_avgs[i], exp_avg_sqs[i])
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
        raise ValueError(f"betas are {betas} and eps is {eps}; betas must be in [0, 1) and eps must not be negative")
    if not params:
        return
    for name, scalar in {"step": step, "lr": lr if isinstance(lr, Tensor) else None, "scale": scale, "found_inf": found_inf}.items():
        check_scalar(name, scalar, params[0].device)
    factors = _factors(step, lr, betas, weight_decay, scale, found_inf)
    _step(params, grads, exp_avgs, exp_avg_sqs, [] if copies is None else copies, spans, factors, *betas, eps)


def _check_dtypes(i: int, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"params[{i}] is {param.dtype}; it must be float32, or float64 on the CPU")
    if exp_avg.dtype != param.dtype or exp_avg_sq.dtype != param.dtype:
        raise ValueError(f"exp_avgs[{i}] is {exp_avg.dtype} and exp_avg_sqs[{i}] {exp_avg_sq.dtype}; they must be {param.dtype} as params[{i}]")
    if grad.dtype == torch.float64 != param.dtype:
        raise ValueError(f"grads[{i}] is float64, but params[{i}] {param.dtype}")


def _factors(
    step: Tensor, lr: float | Tensor, betas: tuple[float, float], weight_decay: float, scale: Tensor | None, found_inf: Tensor | None
) -> Tensor:  # fmt: skip
    """As :func:`naive.step` takes them, in fp64: in fp32 1 − β₂ᵗ has few digits. On the device, where the step is."""
    t = step.double()
    one = torch.ones_like(t)
    rate = one * lr
    return torch.stack(
        [
            1 - rate * weight_decay,
            rate / (1 - betas[0] ** t),
            (1 - betas[1] ** t).rsqrt(),
            one if scale is None else scale.double(),
            torch.zeros_like(t) if found_inf is None else (found_inf != 0).double(),
        ]
    )
