"""The truth: rows of ``[frozen; trainable]``, and the gradient of the trainable ones."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(ids: Tensor, frozen: Tensor, trainable: Tensor) -> Tensor:
    """``[*ids.shape, D]``: row ``ids`` of ``cat([frozen [base, D], trainable [R, D]])``, which is never made.

    ``ids``: int32 or int64. Raises IndexError where one is outside ``[0, base + R)``.
    """
    base, rows = frozen.shape[0], frozen.shape[0] + trainable.shape[0]
    flat = ids.reshape(-1)
    check_ids(flat, rows)
    if base == 0 or rows == base:
        return F.embedding(ids, trainable if base == 0 else frozen)
    out = F.embedding(flat.clamp(max=base - 1), frozen)
    late = (flat >= base).nonzero().squeeze(1)
    out.index_copy_(0, late, trainable.index_select(0, flat[late] - base))
    return out.view(*ids.shape, trainable.shape[1])


def backward(grad: Tensor, ids: Tensor, base: int, rows: int, padding_idx: int) -> Tensor:
    """``[rows, D]``: the gradient of the trainable rows, of which ``padding_idx`` (counted from the first frozen row; -1: none) gets
    nothing. Summed in the order of the tokens, in fp32 at least; what belongs to frozen rows is not looked at."""
    flat = ids.reshape(-1)
    chosen = flat >= base
    if padding_idx >= base:
        chosen &= flat != padding_idx
    late = chosen.nonzero().squeeze(1)
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros(rows, grad.shape[-1], dtype=wide, device=grad.device)
    out.index_add_(0, flat[late] - base, grad.reshape(-1, grad.shape[-1]).index_select(0, late).to(wide))
    return out.to(grad.dtype)


def check_ids(ids: Tensor, rows: int) -> None:
    """Raises IndexError. Waits for the device."""
    if ids.numel() and not ((low := int(ids.min())) >= 0 and int(ids.max()) < rows):
        raise IndexError(f"ids are from {low} to {int(ids.max())}; the vocabulary has rows 0 to {rows - 1}")
