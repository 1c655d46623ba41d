// The token choice and merging ops as torch sees them: vlmfast/ops/token_merge/definition.py defines what they compute.
#pragma once

#define VLMFAST_OPS(OP)                                                                                              \
  OP(top_tokens, "(Tensor scores, SymInt k) -> Tensor")                                                              \
  OP(merge_slots, "(Tensor metric, Tensor kept, SymInt contextual) -> Tensor")                                       \
  OP(merge_rows, "(Tensor hidden, Tensor kept, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor") \
  OP(merge_rows_backward, "(Tensor grad_tokens, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor")
