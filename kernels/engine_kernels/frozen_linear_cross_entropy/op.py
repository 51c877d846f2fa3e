"""``lockstep::frozen_linear_cross_entropy`` and its variant without reduction: plain torch on the CPU, on CUDA with a Triton kernel.

With a mean or a sum one pass gives loss and gradients, since only one number is missing to the latter. Without a reduction the gradients
need the logits once more.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engine_kernels.device import is_checking, uses_triton
from engine_kernels.frozen_linear_cross_entropy import naive
from engine_kernels.frozen_linear_cross_entropy.chunks import Found, Options, run

Wants = tuple[bool, bool, bool]
Reduction = Literal["mean", "sum", "none"]
CHUNK_BYTES = 64 * 1024 * 1024
"""What the logits of the tokens that are worked on at once may take; on CUDA eight times as much, and never fewer tokens than 4,096: smaller
products leave it idle."""


def _run(
    x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, grad: Tensor | None, options: Options, wants: Wants
) -> Found:
    if not uses_triton(x):  # where the number of valid tokens costs nothing
        naive.check_targets(target, frozen.shape[0] + trainable.shape[0], options.ignore_index)
        return run(x, frozen, trainable, target, bias, grad, replace(options, valid=-1), wants, naive.cross_entropy_, naive.ALIGN)
    from engine_kernels.frozen_linear_cross_entropy import triton

    if is_checking():
        naive.check_targets(target, frozen.shape[0] + trainable.shape[0], options.ignore_index)
    return run(x, frozen, trainable, target, bias, grad, options, wants, triton.cross_entropy_, triton.ALIGN)


@torch.library.custom_op("lockstep::frozen_linear_cross_entropy", mutates_args=())
def _fused(
    x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    chunk: int, fp32_logits: bool, valid: int, mean: bool, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    count = (target != ignore_index).sum().clamp(min=1).to(wide)
    scale = count.reciprocal() if mean else torch.ones_like(count)
    wants = want_x, want_weight, want_bias
    grad = scale.expand(x.shape[0]) if any(wants) else None
    options = Options(ignore_index, label_smoothing, z_loss, chunk, fp32_logits, valid)
    found = _run(x, frozen, trainable, target, bias, grad, options, wants)
    return found.losses.sum() * scale, *_given(found, trainable, x)


def _given(found: Found, trainable: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors: empty ones for those that nobody asked for."""
    none = x.new_empty(0)
    weight = trainable.new_empty(0) if found.weight is None else found.weight.to(trainable.dtype)
    return none if found.x is None else found.x, weight, trainable.new_empty(0) if found.bias is None else found.bias.to(trainable.dtype)


@_fused.register_fake
def _(
    x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    chunk: int, fp32_logits: bool, valid: int, mean: bool, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), *_fake_grads(x, trainable, want_x, want_weight, want_bias)


def _fake_grads(x: Tensor, trainable: Tensor, want_x: bool, want_weight: bool, want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    weight = trainable.new_empty(trainable.shape if want_weight else (0,))
    return x.new_empty(x.shape if want_x else (0,)), weight, trainable.new_empty(trainable.shape[0] if want_bias else 0)


def _save_fused(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's
    ctx.set_materialize_grads(False)
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.save_for_backward(*grads)
    ctx.base, ctx.has_bias = inputs[1].shape[0], inputs[4] is not None


def _differentiate_fused(ctx, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    if grad is None:
        return (None,) * 15
    found = ctx.saved_tensors
    if not _is_one(grad):
        found = [_scale(given, grad) if given.numel() else given for given in found]
    return _inputs_grads(ctx, found)


def _is_one(grad: Tensor) -> bool:
    """Whether there is nothing to scale, which saves a copy of all gradients. Not asked where the answer has to be waited for (a GPU), is
    not there yet (a compiler), or where the gradient may be differentiated."""
    return type(grad) is Tensor and grad.device.type == "cpu" and not torch.is_grad_enabled() and bool(grad == 1)


def _inputs_grads(ctx, found) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    x, weight, bias = found
    needs = ctx.needs_input_grad
    if needs[4]:
        bias = torch.cat([bias.new_zeros(ctx.base), bias])  # the frozen ones' is dropped where the two were joined
    return x if needs[0] else None, None, weight if needs[2] else None, None, bias if needs[4] else None, *(None,) * 10


@torch.library.custom_op("lockstep::scale_gradient", mutates_args=())
def _scale(given: Tensor, by: Tensor) -> Tensor:
    return given * by.to(given.dtype)


@_scale.register_fake
def _(given: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(given)


def _twice(*_: object) -> None:
    raise NotImplementedError("frozen_linear_cross_entropy cannot be differentiated twice; use torch.nn.functional.cross_entropy for that")


_scale.register_autograd(_twice)
_fused.register_autograd(_differentiate_fused, setup_context=_save_fused)


@torch.library.custom_op("lockstep::frozen_linear_cross_entropies", mutates_args=())
def _each(
    x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    chunk: int, fp32_logits: bool, valid: int,
) -> Tensor:  # fmt: skip
    options = Options(ignore_index, label_smoothing, z_loss, chunk, fp32_logits, valid)
    return _run(x, frozen, trainable, target, bias, None, options, (False, False, False)).losses


@_each.register_fake
def _(
    x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    chunk: int, fp32_logits: bool, valid: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("lockstep::frozen_linear_cross_entropies_backward", mutates_args=())
def _each_backward(
    grad: Tensor, x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, chunk: int, fp32_logits: bool, valid: int, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wants = want_x, want_weight, want_bias
    options = Options(ignore_index, label_smoothing, z_loss, chunk, fp32_logits, valid)
    found = _run(x, frozen, trainable, target, bias, grad, options, wants)
    return _given(found, trainable, x)


@_each_backward.register_fake
def _(
    grad: Tensor, x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, chunk: int, fp32_logits: bool, valid: int, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake_grads(x, trainable, want_x, want_weight, want_bias)


def _save_each(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ignore_index, label_smoothing, z_loss, chunk, fp32_logits, valid = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = ignore_index, label_smoothing, z_loss, chunk, fp32_logits, valid
    ctx.base = inputs[1].shape[0]


def _differentiate_each(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    needs = ctx.needs_input_grad
    found = _each_backward(grad, *ctx.saved_tensors, *ctx.options, needs[0], needs[2], needs[4])
    return _inputs_grads(ctx, found)[:11]


_each.register_autograd(_differentiate_each, setup_context=_save_each)
_each_backward.register_autograd(_twice)


def _flops(x, frozen, trainable, wants: tuple[bool, bool, bool]) -> int:  # noqa: ANN001
    tokens, width = x
    return 2 * tokens * width * ((frozen[0] + trainable[0]) * (1 + wants[0]) + trainable[0] * wants[1])


@register_flop_formula(torch.ops.lockstep.frozen_linear_cross_entropy)
def _fused_flops(x, frozen, trainable, *options, out_shape=None, **_) -> int:  # noqa: ANN001
    return _flops(x, frozen, trainable, options[-3:])


@register_flop_formula(torch.ops.lockstep.frozen_linear_cross_entropies)
def _each_flops(x, frozen, trainable, *_, out_shape=None, **__) -> int:  # noqa: ANN001
    return _flops(x, frozen, trainable, (False, False, False))


@register_flop_formula(torch.ops.lockstep.frozen_linear_cross_entropies_backward)
def _each_backward_flops(grad, x, frozen, trainable, *options, out_shape=None, **_) -> int:  # noqa: ANN001
    return _flops(x, frozen, trainable, options[-3:])


def frozen_linear_cross_entropy(
    x: Tensor,
    frozen: Tensor,
    trainable: Tensor,
    target: Tensor,
    bias: tuple[Tensor, Tensor] | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    fp32_logits: bool = False,
    chunk: int | None = None,
    valid: int | None = None,
) -> Tensor:
    """Cross-entropy of ``x @ cat([frozen, trainable]).T + bias``, whose logits are never whole; gradients are of x and the trainable rows.

    Args:
        x: ``[*, D]``.
        frozen: ``[base, D]``; base may be 0. trainable: ``[R, D]`` of the same dtype and device as x.
        target: ``[*]`` int64, classes or ``ignore_index``. Ignored tokens cost nothing.
        bias: of the frozen ``[base]`` and of the trainable rows ``[R]``.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        z_loss: the weight of ``logsumexp(logits)²`` (PaLM, arXiv:2204.02311).
        reduction: ``mean`` over the tokens that are not ignored (0 if all are), ``sum``, or ``none``, which computes logits twice.
        fp32_logits: keep logits in fp32 where x is of a smaller dtype.
        chunk: tokens at a time; by default what fits :data:`CHUNK_BYTES`.
        valid: how many tokens are not ignored, where that is known (the data loader counts them): counting here waits for the GPU. At
            least as many as there are, else the loss is NaN.

    Returns a scalar, or ``[*]``, of fp32 (fp64 for fp64). Under autocast it computes in autocast's dtype, as a linear layer does.

    Raises ValueError where shapes, dtypes or devices do not fit, IndexError on the CPU for a target that is no class (on CUDA the loss is
    NaN, or it is the error where ``LOCKSTEP_DEBUG=1`` is set), NotImplementedError when it is differentiated twice.
    """
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    if casts:  # as a linear layer's inputs are
        x, frozen, trainable = (t.to(torch.get_autocast_dtype(kind)) for t in (x, frozen, trainable))
        bias = None if bias is None else (bias[0].to(x.dtype), bias[1].to(x.dtype))
    _check(x, frozen, trainable, target, bias, reduction)
    rows, wanted, goals = x.reshape(-1, x.shape[-1]), torch.is_grad_enabled(), target.reshape(-1)
    both = None if bias is None else torch.cat(bias)
    if chunk is None:
        row_bytes = (frozen.shape[0] + trainable.shape[0]) * (4 if fp32_logits else x.element_size())
        chunk = max(4096, 8 * CHUNK_BYTES // row_bytes) if x.is_cuda else max(1, CHUNK_BYTES // row_bytes)
    options = ignore_index, label_smoothing, z_loss, chunk, fp32_logits, -1 if valid is None else valid
    wants = (wanted and t is not None and t.requires_grad for t in (x, trainable, bias[1] if bias else None))
    with torch.autocast(kind, enabled=False) if casts else nullcontext():
        if reduction == "none":
            return _each(rows, frozen, trainable, goals, both, *options).view(target.shape)
        return _fused(rows, frozen, trainable, goals, both, *options, reduction == "mean", *wants)[0]


def _check(x: Tensor, frozen: Tensor, trainable: Tensor, target: Tensor, bias: tuple[Tensor, Tensor] | None, reduction: str) -> None:
    width = x.shape[-1]
    given = {"x": x, "frozen": frozen, "trainable": trainable}
    if bias is not None:
        given |= {"frozen bias": bias[0], "trainable bias": bias[1]}
    odd = {f"{name} is {t.dtype} on {t.device}" for name, t in given.items() if (t.dtype, t.device) != (x.dtype, x.device)}
    if odd:
        raise ValueError(f"x is {x.dtype} on {x.device}, but {', '.join(sorted(odd))}: all must be alike")
    if frozen.ndim != 2 or trainable.ndim != 2 or frozen.shape[1] != width or trainable.shape[1] != width:
        raise ValueError(f"x has width {width}; frozen {tuple(frozen.shape)} and trainable {tuple(trainable.shape)} must be [rows, {width}]")
    if bias is not None and (bias[0].shape != frozen.shape[:1] or bias[1].shape != trainable.shape[:1]):
        raise ValueError(f"biases are {tuple(bias[0].shape)} and {tuple(bias[1].shape)}; they must be [{frozen.shape[0]}] and [{trainable.shape[0]}]")
    if target.shape != x.shape[:-1] or target.dtype != torch.int64 or target.device != x.device:
        raise ValueError(f"target is {tuple(target.shape)} {target.dtype} on {target.device}; it must be {tuple(x.shape[:-1])} int64 on {x.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it is 'mean', 'sum' or 'none'")
