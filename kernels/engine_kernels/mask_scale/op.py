"""``lockstep::mask_scale``: plain torch on the CPU, Triton on CUDA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_kernels.device import uses_triton
from engine_kernels.intervals import Intervals, check_scalar, check_tensors, spans_of
from engine_kernels.mask_scale import naive


@torch.library.custom_op("lockstep::mask_scale", mutates_args=("grads",))
def _mask_scale(grads: Sequence[Tensor], spans: Sequence[int], scale: Tensor | None) -> None:
    if uses_triton(grads[0]):
        from engine_kernels.mask_scale import triton as kernels
    else:
        kernels = naive
    kernels.mask_scale_(grads, spans, scale)


@_mask_scale.register_fake
def _(*_: object) -> None:
    pass


def mask_scale_(grads: Sequence[Tensor], intervals: Sequence[Intervals], scale: Tensor | None = None) -> None:
    """Sets what is not trained to 0, whatever it is, and multiplies the rest by ``scale``, in place.

    For models that cannot be changed: after it any norm, clip and optimizer sees clean gradients. (An optimizer with weight decay moves
    what is not trained all the same; :func:`masked_adamw_` does not.)

    Args:
        grads: contiguous tensors of fp32, bf16 or fp16 (fp64 on the CPU), of any shapes, on one device.
        intervals: what is trained of each, looked at flat: sorted, disjoint (begin, end), in elements.
        scale: 0-d fp32 on the device. None: what is trained is neither read nor written.

    Never waits for the device. Raises ValueError where anything does not fit.
    """
    check_tensors({"grads": grads})
    spans = spans_of(intervals, [t.numel() for t in grads])
    if grads:
        check_scalar("scale", scale, grads[0].device)
        _mask_scale(grads, spans, scale)
