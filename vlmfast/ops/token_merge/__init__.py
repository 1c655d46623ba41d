"""Fewer visual tokens: the best are kept, and the others are merged."""

from vlmfast.ops.token_merge.definition import merge_rows as merge_rows
from vlmfast.ops.token_merge.definition import merge_rows_backward as merge_rows_backward
from vlmfast.ops.token_merge.definition import merge_slots as merge_slots
from vlmfast.ops.token_merge.definition import merge_tokens, top_tokens, visionzip

__all__ = ["merge_tokens", "top_tokens", "visionzip"]
