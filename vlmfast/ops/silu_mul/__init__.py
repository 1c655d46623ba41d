"""The gated activation of an MLP: activation(gate) * up."""

from vlmfast.ops.silu_mul.definition import silu_mul
from vlmfast.ops.silu_mul.definition import silu_mul_backward as silu_mul_backward

__all__ = ["silu_mul"]
