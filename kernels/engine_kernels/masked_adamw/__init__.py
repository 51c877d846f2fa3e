from engine_kernels.masked_adamw.op import masked_adamw_

__all__ = ["masked_adamw_"]
