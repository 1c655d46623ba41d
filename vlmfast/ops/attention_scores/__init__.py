"""Scores of visual tokens by the attention that they receive."""

from vlmfast.ops.attention_scores.definition import cls_attention, last_row_attention, received_attention

__all__ = ["cls_attention", "last_row_attention", "received_attention"]
