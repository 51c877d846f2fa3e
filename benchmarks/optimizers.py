"""Optimizers that keep every kind of state: an element each, factored, quantised in blocks, and values that a group counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

Groups = list[dict[str, Any]]


class Factored(torch.optim.Optimizer):
    """Adafactor's second moment (Shazeer and Stern 2018): a row and a column for each matrix, of shapes that are not the
    parameter's; a plain one for vectors, and so for ZeRO's flat buffers. torch's own Adafactor does not run on DTensors."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "beta": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, squared = self.state[p], p.grad.square()
                if p.ndim < 2:
                    p.add_(p.grad / (_mean(state, "variance", squared, group).sqrt() + 1e-8), alpha=-group["lr"])
                    continue
                row, column = _mean(state, "row", squared.mean(-1), group), _mean(state, "column", squared.mean(-2), group)
                estimate = row.unsqueeze(-1) * column.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad / (estimate.sqrt() + 1e-8), alpha=-group["lr"])


def _mean(state: dict[str, Any], key: str, new: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    if key not in state:
        state[key] = torch.zeros_like(_settled(new))
    return state[key].mul_(group["beta"]).add_(_settled(new), alpha=1 - group["beta"])


def _settled(tensor: torch.Tensor) -> torch.Tensor:
    """Partial sums are added up; pieces stay pieces."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate() if placement.is_partial() else placement for placement in tensor.placements])


class BlockwiseMomentum(torch.optim.Optimizer):
    """Momentum in 8 bits, as bitsandbytes keeps it: a code an element, and the largest magnitude of each block of 64.

    It works on what a rank holds, so its blocks begin where the local piece begins: they are no tensor of the whole parameter.
    """

    BLOCK = 64

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(self.state[p], _local(p), _local(p.grad), group)

    def _update(self, state: dict[str, Any], p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        blocks = -(-p.numel() // self.BLOCK)
        if not state:
            state["codes"] = torch.full_like(p, 128, dtype=torch.uint8)
            state["absmax"] = torch.zeros(blocks, dtype=torch.float32)
        scale = state["absmax"].repeat_interleave(self.BLOCK)[: p.numel()].view(p.shape) / 127
        momentum = (state["codes"].float() - 128) * scale * group["momentum"] + grad
        padded = torch.zeros(blocks * self.BLOCK)
        padded[: p.numel()] = momentum.reshape(-1)
        largest = padded.view(blocks, self.BLOCK).abs().amax(1)
        codes = (padded.view(blocks, self.BLOCK) / largest.clamp(min=1e-30).unsqueeze(1) * 127).round() + 128
        state["codes"].copy_(codes.reshape(-1)[: p.numel()].view(p.shape))
        state["absmax"].copy_(largest)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum, alpha=group["lr"])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class ScheduleFree(torch.optim.Optimizer):
    """AdamW without a schedule (Defazio et al. 2024), as its authors' package keeps it: ``z`` beside the second moment, and
    ``k``, ``weight_sum`` and ``lr_max`` counted by each group."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "k": 0, "weight_sum": 0.0, "lr_max": -1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            correction = 1 - beta2 ** (group["k"] + 1)
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            mixed = weight / group["weight_sum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"] = torch.clone(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = p.grad / (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"]) + p * group["weight_decay"]
                p.lerp_(state["z"], mixed).add_(update, alpha=lr * (beta1 * (1 - mixed) - 1))
                state["z"].sub_(update, alpha=lr)
            group["k"] += 1


def _cpu_adam(groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, betas=(0.9, 0.95))


OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    "cpu_adam": _cpu_adam,
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "factored": Factored,
    "blockwise": BlockwiseMomentum,
    "schedule_free": ScheduleFree,
}
