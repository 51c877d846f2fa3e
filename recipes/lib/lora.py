"""Low-rank adapters (LoRA, arXiv 2106.09685) that leave the names of the weights they adapt unchanged."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAN_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


class LoRALinear(nn.Linear):
    """``y = x Wᵀ + b + (alpha / rank) · x Aᵀ Bᵀ`` with A ``[rank, in]`` random and B ``[out, rank]`` zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        # Takes the layer's own parameters over, so that nothing is allocated twice.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device))
        self.lora_B = nn.Parameter(self.lora_A.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        return self.weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(model: nn.Module, rank: int, targets: tuple[str, ...] = WAN_TARGETS) -> None:
    """Give every linear layer whose name ends in one of ``targets`` an adapter, with alpha = rank; rank 0 adds none.

    The output does not change until the adapters are trained.
    """
    if rank == 0:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{target}" for target in targets)):
            model.set_submodule(name, LoRALinear(module, rank, alpha=rank))


def freeze_all_but_lora(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("lora_A", "lora_B")))


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same model without adapters, which computes the same function (to rounding)."""
    state = {k: v.detach() for k, v in model.state_dict().items() if not k.endswith(("lora_A", "lora_B"))}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged_weight().detach()
    return state
