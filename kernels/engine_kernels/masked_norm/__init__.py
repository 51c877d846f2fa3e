from engine_kernels.masked_norm.op import Norm, masked_norm

__all__ = ["Norm", "masked_norm"]
