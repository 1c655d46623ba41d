// The arguments and schemas of the attention scores. vlmfast/ops/attention_scores/definition.py defines what they
// compute.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

struct ClsArguments {
  Size batch{"batch"}, heads = Size("heads").at_least(1), head_dim = Size("head_dim").at_least(1).at_most(kHalfInt);
  Size tokens = Size("tokens").at_least(1);
  FloatDtype dtype;
  View<3> query;
  View<4> key;
  int64_t cls;  // the position of the CLS token

  ClsArguments(const Tensor& query_tensor, const Tensor& key_tensor, int64_t cls_index)
      : query("query", query_tensor, {batch, heads, head_dim}, dtype),
        key("key", key_tensor, {batch, heads, tokens, head_dim}, dtype),
        cls(cls_index < 0 ? cls_index + tokens : cls_index) {
    check_within("cls_index", cls_index, -tokens, tokens - 1);
  }
};

struct LastRowArguments {
  Size batch{"batch"}, heads = Size("heads").at_least(1), head_dim = Size("head_dim").at_least(1).at_most(kHalfInt);
  Size key_heads = Size("key heads").at_least(1), tokens = Size("tokens").at_least(1);
  FloatDtype dtype;
  View<3> query;
  View<4> key;
  View<2> valid;

  LastRowArguments(const Tensor& query_tensor, const Tensor& key_tensor, const std::optional<Tensor>& valid_tensor)
      : query("query", query_tensor, {batch, heads, head_dim}, dtype),
        key("key", key_tensor, {batch, key_heads, tokens, head_dim}, dtype),
        valid("valid", valid_tensor, {batch, tokens}, Dtype::kBool) {
    STD_TORCH_CHECK(heads % key_heads == 0, "key must have a number of heads that divides the ", int64_t{heads},
                    " of query, got ", int64_t{key_heads});
  }
};

struct ReceivedArguments {
  Size heads = Size("heads").at_least(1), head_dim = Size("head_dim").at_least(1).at_most(kHalfInt);
  Size tokens = Size("tokens").at_most(kHalfInt), bounds = Size("segments + 1").at_most(kHalfInt);
  FloatDtype dtype;
  View<3> query, key;
  View<1> cu_seqlens;

  ReceivedArguments(const Tensor& query_tensor, const Tensor& key_tensor,
                    const std::optional<Tensor>& cu_seqlens_tensor, int64_t group)
      : query("query", query_tensor, {heads, tokens, head_dim}, dtype),
        key("key", key_tensor, {heads, tokens, head_dim}, dtype),
        cu_seqlens("cu_seqlens", cu_seqlens_tensor, {bounds}, Dtype::kInt32) {
    STD_TORCH_CHECK(group > 0 && tokens % group == 0, "group must divide the ", tokens, " tokens, got ", group);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                 \
  OP(cls_attention, "(Tensor query, Tensor key, float? scale=None, SymInt cls_index=0) -> Tensor")      \
  OP(last_row_attention, "(Tensor query, Tensor key, Tensor? valid=None, float? scale=None) -> Tensor") \
  OP(received_attention,                                                                                \
     "(Tensor query, Tensor key, Tensor? cu_seqlens=None, SymInt group=1, float? scale=None) -> Tensor")
