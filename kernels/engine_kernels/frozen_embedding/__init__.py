from engine_kernels.frozen_embedding.op import frozen_embedding

__all__ = ["frozen_embedding"]
