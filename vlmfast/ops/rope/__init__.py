"""Rotary embedding of queries and keys, and the norms of their heads."""

from vlmfast.ops.rope.definition import qk_norm_rope
from vlmfast.ops.rope.definition import qk_norm_rope_backward as qk_norm_rope_backward

__all__ = ["qk_norm_rope"]
