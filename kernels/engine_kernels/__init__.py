"""Operations and modules for vocabularies of which the first rows are frozen, one folder an operation."""

from engine_kernels.convert import convert
from engine_kernels.frozen_embedding import frozen_embedding
from engine_kernels.frozen_linear_cross_entropy import frozen_linear_cross_entropy
from engine_kernels.modules import PartiallyFrozenEmbedding, PartiallyFrozenLinear

__all__ = ["PartiallyFrozenEmbedding", "PartiallyFrozenLinear", "convert", "frozen_embedding", "frozen_linear_cross_entropy"]
