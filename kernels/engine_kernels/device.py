"""What runs where."""

import os

import torch
from torch import Tensor


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on it are Triton's; else plain torch does them. Triton is imported only then: not every CPU machine has it."""
    return tensor.is_cuda


def is_checking() -> bool:
    """Whether ``LOCKSTEP_DEBUG=1`` is set: then ids and targets out of range are errors on CUDA too, where to look waits for the device."""
    return os.environ.get("LOCKSTEP_DEBUG") == "1"


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``: from pinned memory, since a copy from any other waits for the device."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
