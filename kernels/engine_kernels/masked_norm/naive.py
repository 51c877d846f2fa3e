"""The truth: the sum of squares of the trained elements."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine_kernels.intervals import triples


def sum_of_squares(grads: Sequence[Tensor], spans: Sequence[int]) -> Tensor:
    """0-d fp32. Not finite where an element is not, or where it is too large for fp32."""
    sums = [torch.zeros((), device=grads[0].device)]
    for i, begin, end in triples(spans):
        own = grads[i].view(-1)[begin:end]
        sums.append(own.to(torch.promote_types(own.dtype, torch.float32)).square().sum().float())
    return torch.stack(sums).sum()
