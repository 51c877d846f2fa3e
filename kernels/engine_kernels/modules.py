"""An embedding and a head whose first rows are frozen. Their weight is two parameters, so that no optimizer, decay or engine can move the
frozen ones; state dicts have it as one, under its usual name."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_kernels.frozen_embedding import frozen_embedding
from engine_kernels.frozen_linear_cross_entropy import frozen_linear_cross_entropy


class _PartiallyFrozen(nn.Module):
    """What both have in common. ``row_parts``: by the name of each whole tensor, the parameters that are its rows, in order: what
    checkpoints know it by."""

    row_parts: dict[str, tuple[str, str]]
    frozen: nn.Parameter
    trainable: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.row_parts = {}

    def _set_rows(self, name: str, whole: Tensor, base: int, parts: tuple[str, str]) -> None:
        if not 0 <= base <= whole.shape[0]:
            raise ValueError(f"base is {base}; the {name} has {whole.shape[0]} rows, so it must be 0 to {whole.shape[0]}")
        whole = whole.detach()
        self.register_parameter(parts[0], nn.Parameter(whole[:base].clone(), requires_grad=False))
        self.register_parameter(parts[1], nn.Parameter(whole[base:].clone()))
        self.row_parts[name] = parts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for whole, (first, second) in self.row_parts.items():
            rows = [getattr(self, first), getattr(self, second)]
            destination[prefix + whole] = torch.cat(rows if keep_vars else [part.detach() for part in rows])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        if strict:
            own = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
            unexpected += [key for key in own if key.removeprefix(prefix) not in (*self.row_parts, "_extra_state")]
        for whole, names in self.row_parts.items():
            given, parts = state_dict.get(prefix + whole), [getattr(self, name) for name in names]
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            if given is None:
                if strict:
                    missing.append(prefix + whole)
            elif tuple(given.shape) != shape:
                errors.append(f"size mismatch for {prefix + whole}: copying a param with shape {tuple(given.shape)}, the shape here is {shape}")
            elif not _is_exact(given[: parts[0].shape[0]], parts[0].dtype):
                errors.append(
                    f"{prefix + whole} is {given.dtype} in the state dict and its frozen rows are {parts[0].dtype} here, which would round them: "
                    "convert the module's dtype first, or the state dict's on purpose"
                )
            else:
                for name, part, values in zip(names, parts, given.detach().split([part.shape[0] for part in parts]), strict=True):
                    if local_metadata.get("assign_to_params_buffers", False):
                        setattr(self, name, nn.Parameter(values.clone(), requires_grad=part.requires_grad))
                    else:
                        with torch.no_grad():
                            part.copy_(values)

    @property
    def base(self) -> int:
        """How many rows are frozen."""
        return self.frozen.shape[0]

    @property
    def weight(self) -> Tensor:
        """``[V, D]``: a new tensor at each call. Gradients reach the trainable rows through it."""
        return torch.cat([self.frozen, self.trainable])


def _is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether nothing is lost in this dtype."""
    return torch.promote_types(values.dtype, dtype) == dtype or torch.equal(values.to(dtype).to(values.dtype).nan_to_num(), values.nan_to_num())


class PartiallyFrozenEmbedding(_PartiallyFrozen):
    """As :class:`torch.nn.Embedding`, with rows [0, base) frozen.

    Args:
        weight: ``[V, D]``, copied.
        base: how many rows are frozen, 0 to V.
        padding_idx: as there; it gets no gradient.

    Raises ValueError for another ``base``.
    """

    def __init__(self, weight: Tensor, base: int, padding_idx: int | None = None) -> None:
        super().__init__()
        base = operator.index(base)
        self._set_rows("weight", weight, base, ("frozen", "trainable"))
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.frozen.shape[0] + self.trainable.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.trainable.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return frozen_embedding(ids, self.frozen, self.trainable, -1 if self.padding_idx is None else self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, base={self.base}{padding}"


class PartiallyFrozenLinear(_PartiallyFrozen):
    """As :class:`torch.nn.Linear`, with output rows [0, base) of weight and bias frozen.

    Args:
        weight: ``[V, D]``, copied.
        base: how many rows are frozen, 0 to V.
        bias: ``[V]``, copied, or None.

    Called with a ``target`` it returns the cross-entropy, see :func:`~engine_kernels.frozen_linear_cross_entropy`, and logits are never
    whole. Raises ValueError for another ``base``.
    """

    frozen_bias: nn.Parameter
    trainable_bias: nn.Parameter

    def __init__(self, weight: Tensor, base: int, bias: Tensor | None = None) -> None:
        super().__init__()
        base = operator.index(base)
        self._set_rows("weight", weight, base, ("frozen", "trainable"))
        if bias is not None:
            self._set_rows("bias", bias, base, ("frozen_bias", "trainable_bias"))

    @property
    def in_features(self) -> int:
        return self.trainable.shape[1]

    @property
    def out_features(self) -> int:
        return self.frozen.shape[0] + self.trainable.shape[0]

    def forward(self, x: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        biases = (self.frozen_bias, self.trainable_bias) if "bias" in self.row_parts else None
        if target is not None:
            return frozen_linear_cross_entropy(x, self.frozen, self.trainable, target, biases, **options)
        first, second = biases or (None, None)
        return torch.cat([F.linear(x, self.frozen, first), F.linear(x, self.trainable, second)], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, base={self.base}, bias={'bias' in self.row_parts}"
