"""``lockstep::sum_of_squares``: plain torch on the CPU, Triton on CUDA; and the norm, flag and scale that follow from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine_kernels.device import uses_triton
from engine_kernels.intervals import Intervals, check_scalar, check_tensors, spans_of
from engine_kernels.masked_norm import naive


class Norm(NamedTuple):
    """All 0-d fp32, on the device of the gradients. ``norm``: L2, of the gradients times ``inverse_scale``. ``found_inf``: 1.0 where a trained
    element is not finite, or their squares' sum is too large for fp32; else 0.0. ``scale``: what gradients are to be multiplied by."""

    norm: Tensor
    found_inf: Tensor
    scale: Tensor


@torch.library.custom_op("lockstep::sum_of_squares", mutates_args=())
def _sum_of_squares(grads: Sequence[Tensor], spans: Sequence[int]) -> Tensor:
    if uses_triton(grads[0]):
        from engine_kernels.masked_norm import triton as kernels
    else:
        kernels = naive
    return kernels.sum_of_squares(grads, spans)


@_sum_of_squares.register_fake
def _(grads: Sequence[Tensor], spans: Sequence[int]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@torch.no_grad()
def masked_norm(
    grads: Sequence[Tensor],
    intervals: Sequence[Intervals],
    *,
    inverse_scale: Tensor | None = None,
    max_norm: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Norm:
    """The norm of the trained elements, and what :func:`masked_adamw_` takes: whether one is not finite, and the scale that clips them.

    Args:
        grads: contiguous tensors of fp32, bf16 or fp16 (fp64 on the CPU), of any shapes, on one device.
        intervals: what is trained of each, looked at flat: sorted, disjoint (begin, end), in elements. Nothing else is read.
        inverse_scale: 1 / loss scale, 0-d fp32 on the device; None: 1.
        max_norm: gradients are clipped to it as by :func:`torch.nn.utils.clip_grad_norm_`; 0: they are not.
        group: its ranks hold other, disjoint parts of the gradients, and the sum is over all of them. This is a collective then: every rank of
            the group calls it once a step, one without gradients too (with ``inverse_scale``, which tells its device); where one does not, the
            others wait until the group's timeout. None: nothing is exchanged.

    scale = inverse_scale * min(1, max_norm / (norm + 1e-6)). The same input gives the same bits, and no host waits for its device. Raises
    ValueError where anything does not fit.
    """
    check_tensors({"grads": grads})
    spans = spans_of(intervals, [t.numel() for t in grads])
    if not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive, or 0 for no clipping")
    device = grads[0].device if grads else torch.device("cpu") if inverse_scale is None else inverse_scale.device
    check_scalar("inverse_scale", inverse_scale, device)
    squares = _sum_of_squares(grads, spans) if spans else torch.zeros((), device=device)
    if group is not None:
        dist.all_reduce(squares, group=group)  # the flag follows from the sum: what is not finite stays so
    scale = torch.ones_like(squares) if inverse_scale is None else inverse_scale.float()
    norm = squares.sqrt() * scale
    clipped = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else scale.clone()
    return Norm(norm, (~squares.isfinite()).float(), clipped)
