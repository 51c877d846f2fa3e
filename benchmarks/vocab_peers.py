"""Ways to fine-tune a vocabulary whose first rows stay as they are: an embedding, tanh in place of a trunk, and a head with its loss.

All begin with the same weights. PEFT leaves out the bias of a head, so that it trains less than the others do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_kernels import PartiallyFrozenEmbedding, PartiallyFrozenLinear
from engine_kernels.frozen_linear_cross_entropy.chunks import Columns, Options

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """``V`` rows of which ``base`` are frozen, of width ``D``; ``N`` tokens a step, of which the share ``ignored`` has no target."""

    V: int
    base: int
    D: int
    N: int
    ignored: float = 0.0

    @property
    def kept(self) -> int:
        """The tokens with a target."""
        return self.N - int(self.N * self.ignored)

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Ids and targets ``[N]``, over the whole vocabulary."""
        torch.manual_seed(1)
        ids, target = torch.randint(self.V, (2, self.N))
        target[torch.randperm(self.N)[self.kept :]] = -100
        return ids.to(device), target.to(device)


@dataclass
class Peer:
    """``embed``: ids ``[N]`` -> ``[N, D]``; ``head``: that and targets -> the mean loss, for which ``loss`` takes the ids. ``cross_entropy``:
    forward and backward of the loss of logits ``[N, width]``. ``frozen``: what training must not change, weights and bias."""

    embed: Callable[[Tensor], Tensor]
    head: Loss
    loss: Loss
    cross_entropy: Callable[[Tensor, Tensor], Any]
    width: int
    trained: list[nn.Parameter]
    frozen: list[Tensor]

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.01, fused=True)

    def step(self, ids: Tensor, target: Tensor) -> Tensor:
        """One of training; returns the loss."""
        loss = self.loss(ids, target)
        loss.backward()
        self.update()
        self.forget()
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.step()

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_bytes(self) -> int:
        """Of what is kept an element; not the steps."""
        kept = [t for state in self._optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
        return sum(t.numel() * t.element_size() for t in kept)


def _weights(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of the embedding, the head, and its bias."""
    torch.manual_seed(0)
    embedding, head = (torch.randn(size.V, size.D, device=device).mul_(0.02).to(dtype) for _ in range(2))
    return embedding, head, torch.zeros(size.V, dtype=dtype, device=device)


def _plain(size: Size, dtype: torch.dtype, device: str) -> tuple[nn.Embedding, nn.Linear]:
    weight, head, bias = _weights(size, dtype, device)
    embedding, linear = nn.Embedding(size.V, size.D, _weight=weight), nn.Linear(size.D, size.V, device="meta")
    linear.weight, linear.bias = nn.Parameter(head), nn.Parameter(bias)
    return embedding, linear


def _peer(embed: Any, head: Loss, cross_entropy: Any, width: int, trained: list[nn.Parameter], frozen: list[Tensor]) -> Peer:
    def loss(ids: Tensor, target: Tensor) -> Tensor:
        return head(torch.tanh(embed(ids)), target)

    return Peer(embed, head, loss, cross_entropy, width, trained, frozen)


def _differentiate_cross_entropy(logits: Tensor, target: Tensor) -> None:
    F.cross_entropy(logits.requires_grad_().float(), target).backward()


def ours(size: Size, dtype: torch.dtype, device: str) -> Peer:
    weight, head_weight, bias = _weights(size, dtype, device)
    embedding, head = PartiallyFrozenEmbedding(weight, size.base), PartiallyFrozenLinear(head_weight, size.base, bias)
    if device == "cuda":
        from engine_kernels.frozen_linear_cross_entropy.triton import ALIGN, cross_entropy_
    else:
        from engine_kernels.frozen_linear_cross_entropy.naive import ALIGN, cross_entropy_
    columns = Columns(size.base, size.V - size.base, ALIGN)
    options = Options(ignore_index=-100, label_smoothing=0.0, z_loss=0.0, chunk=size.N, fp32_logits=False, valid=-1)
    grad = torch.full((size.N,), 1 / size.kept, device=device)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return head(x, target, valid=size.kept)  # which a data loader knows

    def kernel(logits: Tensor, target: Tensor) -> None:
        cross_entropy_(logits, columns, target, columns.spread(bias), grad, options)

    trained = [embedding.trainable, head.trainable, head.trainable_bias]
    return _peer(embedding, loss, kernel, columns.width, trained, [embedding.frozen, head.frozen, head.frozen_bias])


def _hooked(size: Size, dtype: torch.dtype, device: str) -> tuple[nn.Embedding, nn.Linear, list[nn.Parameter], list[Tensor]]:
    def without_frozen(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[: size.base] = 0
        return grad

    embedding, linear = _plain(size, dtype, device)
    trained = [embedding.weight, linear.weight, linear.bias]
    for parameter in trained:
        parameter.register_hook(without_frozen)
    return embedding, linear, trained, [parameter.detach()[: size.base] for parameter in trained]


def hook(size: Size, dtype: torch.dtype, device: str) -> Peer:
    """The common way: all rows are parameters, and a hook on each gradient zeroes what belongs to frozen ones."""
    embedding, linear, trained, frozen = _hooked(size, dtype, device)

    def head(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(linear(x).float(), target)

    return _peer(embedding, head, _differentiate_cross_entropy, size.V, trained, frozen)


def hook_compiled(size: Size, dtype: torch.dtype, device: str) -> Peer:
    peer, compiled = hook(size, dtype, device), partial(torch.compile, dynamic=False)
    loss = compiled(lambda logits, target: F.cross_entropy(logits.float(), target))

    def cross_entropy(logits: Tensor, target: Tensor) -> None:
        loss(logits.requires_grad_(), target).backward()

    return replace(peer, embed=compiled(peer.embed), head=compiled(peer.head), loss=compiled(peer.loss), cross_entropy=cross_entropy)


def liger(size: Size, dtype: torch.dtype, device: str) -> Peer:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    embedding, linear, trained, frozen = _hooked(size, dtype, device)
    fused, alone = LigerFusedLinearCrossEntropyLoss(), LigerCrossEntropyLoss()

    def head(x: Tensor, target: Tensor) -> Tensor:
        return fused(linear.weight, x, target, linear.bias)

    def cross_entropy(logits: Tensor, target: Tensor) -> None:
        alone(logits.requires_grad_(), target).backward()

    return _peer(embedding, head, cross_entropy, size.V, trained, frozen)


def peft(size: Size, dtype: torch.dtype, device: str) -> Peer:
    from peft import TrainableTokensConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    embedding, linear = _plain(size, dtype, device)
    model = nn.ModuleDict({"emb": embedding, "head": linear})
    config = TrainableTokensConfig(target_modules=["emb", "head"], token_indices=list(range(size.base, size.V)))
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model  # pyright: ignore[reportArgumentType]

    def head(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(adapted["head"](x).float(), target)

    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    frozen = [parameter.detach()[: size.base] for parameter in (embedding.weight, linear.weight, linear.bias)]
    return _peer(adapted["emb"], head, _differentiate_cross_entropy, size.V, trained, frozen)


PEERS: dict[str, Callable[[Size, torch.dtype, str], Peer]] = {
    "ours": ours,
    "hook": hook,
    "hook_compiled": hook_compiled,
    "peft": peft,
    "liger": liger,
}
_PACKAGES = {"peft": ("peft", "transformers"), "liger": ("liger_kernel",)}
"""What a peer needs beyond torch."""


def peers(device: str) -> list[str]:
    """Those whose packages are here; Liger's is for a GPU."""
    return [name for name in PEERS if all(find_spec(package) for package in _PACKAGES.get(name, ())) and (name != "liger" or device == "cuda")]


def versions(name: str) -> str:
    """Of what it needs, and of Triton where that is here."""
    packages = [*_PACKAGES.get(name, ()), *(["triton"] if find_spec("triton") else [])]
    return ", ".join(f"{package} {version(package.replace('_', '-'))}" for package in packages)
