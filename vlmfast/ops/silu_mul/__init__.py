"""The product of an activated gate and what it lets through."""

from vlmfast.ops.silu_mul.definition import silu_mul
from vlmfast.ops.silu_mul.definition import silu_mul_backward as silu_mul_backward

__all__ = ["silu_mul"]
