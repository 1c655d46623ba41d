// The attention scores as torch sees them: vlmfast/ops/attention_scores/definition.py defines what they compute.
#pragma once

#define VLMFAST_OPS(OP)                                                                            \
  OP(cls_attention, "(Tensor query, Tensor key, float? scale=None, SymInt cls_index=0) -> Tensor") \
  OP(received_attention,                                                                           \
     "(Tensor query, Tensor key, Tensor? cu_seqlens=None, SymInt group=1, float? scale=None) -> Tensor")
