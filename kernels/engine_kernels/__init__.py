"""Operations and modules for vocabularies of which the first rows are frozen, and for staging; one folder an operation."""

from engine_kernels.convert import convert
from engine_kernels.frozen_embedding import frozen_embedding
from engine_kernels.frozen_linear_cross_entropy import frozen_linear_cross_entropy
from engine_kernels.mask_scale import mask_scale_
from engine_kernels.masked_adamw import masked_adamw_
from engine_kernels.masked_norm import masked_norm
from engine_kernels.modules import PartiallyFrozenEmbedding, PartiallyFrozenLinear
from engine_kernels.pack_checksum import checksums, pack_checksum

__all__ = [
    "PartiallyFrozenEmbedding", "PartiallyFrozenLinear", "checksums", "convert", "frozen_embedding", "frozen_linear_cross_entropy", "mask_scale_",
    "masked_adamw_", "masked_norm", "pack_checksum",
]  # fmt: skip
