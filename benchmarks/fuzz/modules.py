"""Random module trees: every kind of parameter, buffer and extra state, each in a forward that uses it."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.fuzz import values

WIDTH, VOCABULARY = 8, 12
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
_TABLE = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Node:
    """A module of a tree: ``kind`` names a class of :data:`KINDS`, which takes ``args``."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    children: dict[str, "Node"] = field(default_factory=dict)

    def walk(self) -> Iterator["Node"]:
        yield self
        for child in self.children.values():
            yield from child.walk()


class Maker:
    """Gives every tensor and value of a model, in the order of its building, from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 0.3

    def number(self) -> int:
        return self.random.randrange(2**31)


class Tree(nn.Module):
    """Children in a list, a dict, or as attributes; one after another."""

    def __init__(self, make: Maker, children: dict[str, nn.Module], how: str) -> None:
        super().__init__()
        self.how, self.order = how, list(children)
        if how == "list":
            self.inner = nn.ModuleList(children.values())
        elif how == "dict":
            self.inner = nn.ModuleDict(children)
        else:
            for name, child in children.items():
                self.add_module(name, child)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        held: Any = self._modules if self.how == "attributes" else self.inner
        for child in held if self.how == "list" else [held[name] for name in self.order]:
            x = child(x, ids)
        return x


class Affine(nn.Module):
    """Linear; square ones can be tied."""

    def __init__(self, make: Maker, out: int, bias: bool, norm: str = "") -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, out, bias=bias)
        if norm == "weight":
            self.lin = nn.utils.parametrizations.weight_norm(self.lin)
        elif norm == "spectral":
            self.lin = nn.utils.parametrizations.spectral_norm(self.lin)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.lin(x)).mean(-1, keepdim=True)


class Embed(nn.Module):
    def __init__(self, make: Maker, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x + self.table(ids)


class Norm(nn.Module):
    def __init__(self, make: Maker, which: str) -> None:
        super().__init__()
        self.norm: nn.Module = {
            "layer": lambda: nn.LayerNorm(WIDTH),
            "plain layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
            "rms": lambda: nn.RMSNorm(WIDTH),
            "group": lambda: nn.GroupNorm(2, WIDTH),
            "batch": lambda: nn.BatchNorm1d(WIDTH),
            "batch, summed up": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
            "batch, not affine": lambda: nn.BatchNorm1d(WIDTH, affine=False),
        }[which]()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Conv(nn.Module):
    def __init__(self, make: Maker, channels: int, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        if flat:
            self.conv: nn.Module = nn.Conv1d(1, channels, 3, padding=1)
        else:
            self.conv = nn.Conv2d(1, channels, 3, padding=1).to(memory_format=torch.channels_last)  # pyright: ignore

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        shaped = x.unsqueeze(1) if self.flat else x.view(len(x), 1, 2, WIDTH // 2)
        return x + self.conv(shaped).mean(1).reshape(x.shape)


class Raw(nn.Module):
    """Parameters of any shape; ``transposed`` ones are not contiguous."""

    def __init__(self, make: Maker, shapes: list[tuple[int, ...]], held: str, transposed: bool) -> None:
        super().__init__()
        self.held = held
        made = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        if transposed:
            made.append(nn.Parameter(torch.empty(3, 5).t()))
        if held == "list":
            self.weights: Any = nn.ParameterList(made)
        elif held == "dict":
            self.weights = nn.ParameterDict({f"w{i}": p for i, p in enumerate(made)})
        else:
            for i, p in enumerate(made):
                self.register_parameter(f"w{i}", p)
            self.register_parameter("none", None)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        total: Any = 0.0
        for p in self.weights.values() if self.held == "dict" else self._own():
            total = total + p.sum()
        return x * (1.0 + 0.1 * torch.tanh(total))

    def _own(self) -> Any:
        return list(self.weights) if self.held == "list" else list(self.parameters(recurse=False))


class Buffers(nn.Module):
    """Buffers of any dtype. ``how``: they stay, are changed in place, are replaced in each forward, or are two names of one."""

    def __init__(self, make: Maker, made: list[tuple[str, tuple[int, ...], bool, str]]) -> None:
        super().__init__()
        self.made = made
        for i, (dtype, shape, persistent, how) in enumerate(made):
            kind = values.DTYPES[dtype]
            seed = make.number() if persistent else 5
            if how in ("in place", "replaced"):
                value = torch.full(shape, seed % 11).to(kind)
            else:
                value = values.random_bits(kind, shape, seed)
            if how == "transposed":
                value = values.random_bits(kind, (3, 2), seed).t()
            if how == "expanded":
                value = values.random_bits(kind, (1, 2), seed).expand(3, 2)
            self.register_buffer(f"b{i}", value, persistent=persistent)
            if how == "tied":
                self.register_buffer(f"tied{i}", value, persistent=persistent)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        for i, (_, _, persistent, how) in enumerate(self.made):
            buffer = self.get_buffer(f"b{i}")
            if not persistent or how not in ("in place", "replaced"):
                continue
            with torch.no_grad():
                if how == "in place":
                    buffer.add_(1)
                else:
                    setattr(self, f"b{i}", buffer + torch.ones((), dtype=buffer.dtype))
            x = x + 1e-3 * torch.sin(buffer.float().sum()).to(x.dtype)
        return x


class Late(nn.Module):
    """A buffer that is None until a forward fills it, and that later ones change."""

    def __init__(self, make: Maker, grows: bool) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("origin", torch.tensor(make.random.random()))
        self.register_buffer("cache", None)
        self.register_buffer("never", None)

    cache: torch.Tensor | None
    origin: torch.Tensor

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.arange(3, dtype=torch.float32) + self.origin
        elif self.grows:
            self.cache = self.cache * 1.5
        return x + 1e-3 * torch.sin(self.cache.sum()).to(x.dtype)


class Extra(nn.Module):
    """Extra state of some kind, which each forward changes and uses."""

    def __init__(self, make: Maker, kind: str) -> None:
        super().__init__()
        self._held = [values.make(kind, make.number())]  # in a list, so that none becomes a parameter

    def get_extra_state(self) -> Any:
        return self._held[0]

    def set_extra_state(self, state: Any) -> None:
        self._held = [state]

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self._held = [values.bump(self._held[0])]
        return x + values.weigh(self._held[0])


class Window(nn.Module):
    """A tensor that is no buffer, and a number, in the state dict all the same."""

    def __init__(self, make: Maker) -> None:
        super().__init__()
        self._seen = [torch.full((3,), float(make.number() % 7))]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}seen"] = self._seen[0]

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self._seen = [state.pop(f"{prefix}seen")]
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        self._seen = [self._seen[0] * 0.5 + 1]
        return x + values.weigh(self._seen[0])


class Noise(nn.Module):
    def __init__(self, make: Maker) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


class Unused(nn.Module):
    """Parameters that never get a gradient, though they want one."""

    def __init__(self, make: Maker) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x


KINDS: dict[str, type[nn.Module]] = {
    "affine": Affine, "embed": Embed, "norm": Norm, "conv": Conv, "raw": Raw, "buffers": Buffers, "late": Late,
    "extra": Extra, "window": Window, "noise": Noise, "unused": Unused,
}  # fmt: skip


class Root(nn.Module):
    """A tree between a fixed table of inputs and a loss."""

    def __init__(self, tree: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.head, self.dtype = tree, nn.Linear(WIDTH, 3), dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.net(_TABLE[ids].to(self.dtype), ids)
        return (self.head(x).float() - 0.5).square().mean()


def build(node: Node, seed: int, dtype: str, tied: int, frozen: int) -> Root:
    """Return the model of a tree. Of its square weights ``tied`` pairs are one; every ``frozen``-th parameter is frozen."""
    make = Maker(seed)
    root = Root(_build(node, make), DTYPES[dtype])
    square = [m.lin for m in root.modules() if isinstance(m, Affine) and isinstance(m.lin, nn.Linear)]
    square = [lin for lin in square if not hasattr(lin, "parametrizations") and len(lin.weight) == WIDTH]
    for first, second in list(itertools.pairwise(square))[:tied]:
        second.weight = first.weight
    with torch.no_grad():
        for name, p in root.named_parameters():
            p.copy_(make.tensor(tuple(p.shape)) + (1.0 if "norm" in name else 0.0))
        for name, buffer in root.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(make.random.random())
    if dtype != "fp32":
        for p in root.parameters():
            p.data = p.data.to(DTYPES[dtype])
        for module in root.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.utils.parametrizations._SpectralNorm)):
                module.to(DTYPES[dtype])
    if frozen:
        for i, p in enumerate(root.net.parameters()):
            p.requires_grad_(i % frozen != 0)
    return root


def _build(node: Node, make: Maker) -> nn.Module:
    if node.kind == "tree":
        return Tree(make, {name: _build(child, make) for name, child in node.children.items()}, **node.args)
    return KINDS[node.kind](make, **node.args)
