"""Rows chosen by a mask: added to, replaced and packed."""

from vlmfast.ops.masked_rows.definition import compact_tokens, deepstack_add, place_embeddings, row_index
from vlmfast.ops.masked_rows.definition import compact_tokens_backward as compact_tokens_backward
from vlmfast.ops.masked_rows.definition import split_rows as split_rows

__all__ = ["compact_tokens", "deepstack_add", "place_embeddings", "row_index"]
