"""Root-mean-square normalisation, alone and after a residual addition."""

from vlmfast.ops.rms_norm.definition import add_rms_norm, rms_norm
from vlmfast.ops.rms_norm.definition import rms_norm_backward as rms_norm_backward

__all__ = ["add_rms_norm", "rms_norm"]
