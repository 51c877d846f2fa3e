from engine_kernels.frozen_linear_cross_entropy.op import frozen_linear_cross_entropy

__all__ = ["frozen_linear_cross_entropy"]
