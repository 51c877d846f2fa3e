"""``lockstep::frozen_embedding``: plain torch on the CPU, Triton on CUDA."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engine_kernels.device import is_checking, uses_triton
from engine_kernels.frozen_embedding import naive


@torch.library.custom_op("lockstep::frozen_embedding", mutates_args=())
def _forward(ids: Tensor, frozen: Tensor, trainable: Tensor, padding_idx: int) -> Tensor:
    if not uses_triton(trainable):
        return naive.forward(ids, frozen, trainable)
    from engine_kernels.frozen_embedding import triton

    if is_checking():
        naive.check_ids(ids, frozen.shape[0] + trainable.shape[0])
    return triton.forward(ids, frozen, trainable)


@_forward.register_fake
def _(ids: Tensor, frozen: Tensor, trainable: Tensor, padding_idx: int) -> Tensor:
    return trainable.new_empty(*ids.shape, trainable.shape[1])


@torch.library.custom_op("lockstep::frozen_embedding_backward", mutates_args=())
def _backward(grad: Tensor, ids: Tensor, base: int, rows: int, padding_idx: int) -> Tensor:
    if not uses_triton(grad):
        return naive.backward(grad, ids, base, rows, padding_idx)
    from engine_kernels.frozen_embedding import triton

    return triton.backward(grad, ids, base, rows, padding_idx)


@_backward.register_fake
def _(grad: Tensor, ids: Tensor, base: int, rows: int, padding_idx: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1])


def _save(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's
    ids, frozen, trainable, padding_idx = inputs
    ctx.save_for_backward(ids)
    ctx.sizes = frozen.shape[0], trainable.shape[0], padding_idx


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    (ids,) = ctx.saved_tensors
    return None, None, _backward(grad, ids, *ctx.sizes) if ctx.needs_input_grad[2] else None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _twice(*_: object) -> None:
    raise NotImplementedError("frozen_embedding cannot be differentiated twice; use torch.nn.functional.embedding for that")


_backward.register_autograd(_twice)


@register_flop_formula([torch.ops.lockstep.frozen_embedding, torch.ops.lockstep.frozen_embedding_backward])
def _flops(*_: object, **__: object) -> int:
    return 0  # as torch counts embeddings


def frozen_embedding(ids: Tensor, frozen: Tensor, trainable: Tensor, padding_idx: int = -1) -> Tensor:
    """Rows of ``cat([frozen, trainable])``, of which only ``trainable`` gets a gradient.

    Args:
        ids: int32 or int64, any shape; each in ``[0, base + R)``.
        frozen: ``[base, D]``; base may be 0.
        trainable: ``[R, D]`` of the same dtype and device; R may be 0.
        padding_idx: a row of the whole that gets no gradient; -1 for none.

    Returns ``[*ids.shape, D]``. Raises ValueError where dtypes, devices or widths differ, IndexError on the CPU for an id out of range
    (on CUDA it gives a row of NaN, or the error where ``LOCKSTEP_DEBUG=1`` is set: a check waits for the device), and NotImplementedError
    when it is differentiated twice.
    """
    if frozen.dtype != trainable.dtype or frozen.device != trainable.device or frozen.shape[1:] != trainable.shape[1:]:
        raise ValueError(
            f"frozen rows are {tuple(frozen.shape)} {frozen.dtype} on {frozen.device}, trainable ones {tuple(trainable.shape)} {trainable.dtype} on "
            f"{trainable.device}: both must have one width, dtype and device"
        )
    if ids.device != trainable.device or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids are {ids.dtype} on {ids.device}; they must be int32 or int64 on {trainable.device}")
    return _forward(ids, frozen, trainable, padding_idx)
