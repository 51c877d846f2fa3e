from engine_kernels.mask_scale.op import mask_scale_

__all__ = ["mask_scale_"]
