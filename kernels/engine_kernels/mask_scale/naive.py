"""The truth: what is not trained becomes 0, what is trained is scaled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_kernels.intervals import gaps_of, triples


def mask_scale_(grads: Sequence[Tensor], spans: Sequence[int], scale: Tensor | None) -> None:
    """In place. Scaled in fp32 at least."""
    for i, begin, end in triples(gaps_of(spans, [t.numel() for t in grads])):
        grads[i].view(-1)[begin:end] = 0
    if scale is not None:
        for i, begin, end in triples(spans):
            own = grads[i].view(-1)[begin:end]
            own.copy_(own.to(torch.promote_types(own.dtype, torch.float32)) * scale)
