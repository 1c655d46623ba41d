"""How much attention each visual token gets."""

from vlmfast.ops.attention_scores.definition import cls_attention, received_attention

__all__ = ["cls_attention", "received_attention"]
