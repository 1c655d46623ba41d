// The attention scores as torch sees them; vlmfast/ops/attention_scores.py defines what they compute.
#pragma once

namespace vlmfast {

inline constexpr const char kClsAttentionSchema[] =
    "cls_attention(Tensor query, Tensor key, float? scale=None, SymInt cls_index=0) -> Tensor";

inline constexpr const char kReceivedAttentionSchema[] =
    "received_attention(Tensor query, Tensor key, Tensor? cu_seqlens=None, SymInt group=1, float? scale=None)"
    " -> Tensor";

}  // namespace vlmfast
