// The arguments and schemas of the ops that choose and merge tokens. vlmfast/ops/token_merge/definition.py defines what
// they compute.
#pragma once

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

struct TopTokensArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kHalfInt);
  FloatDtype dtype;
  View<2> scores;

  TopTokensArguments(const Tensor& scores_tensor, int64_t k) : scores("scores", scores_tensor, {batch, tokens}, dtype) {
    check_within("k", k, 0, tokens);
  }
};

// The rows of all tokens, which are hidden states or a metric, and the positions of the kept tokens.
struct MergeArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kHalfInt), hidden = Size("hidden").at_most(kHalfInt);
  Size kept_count{"kept_count"};
  FloatDtype dtype;
  View<3> rows;
  View<2> kept;

  MergeArguments(const char* name, const Tensor& rows_tensor, const Tensor& kept_tensor, int64_t contextual)
      : rows(name, rows_tensor, {batch, tokens, hidden}, dtype),
        kept("kept", kept_tensor, {batch, kept_count}, Dtype::kInt64) {
    check_within("the size of kept", kept_count, 0, tokens);
    check_within("contextual", contextual, 0, tokens - kept_count);
  }
};

struct MergeSlotsArguments : MergeArguments {
  MergeSlotsArguments(const Tensor& metric_tensor, const Tensor& kept_tensor, int64_t contextual)
      : MergeArguments("metric", metric_tensor, kept_tensor, contextual) {}
};

struct MergeRowsArguments : MergeArguments {
  View<2> slots;

  MergeRowsArguments(const Tensor& hidden_tensor, const Tensor& kept_tensor, const Tensor& slots_tensor,
                     int64_t contextual)
      : MergeArguments("hidden", hidden_tensor, kept_tensor, contextual),
        slots("slots", slots_tensor, {batch, tokens}, Dtype::kInt32) {}
};

struct MergeGradientArguments {
  Size batch{"batch"}, merged_count = Size("kept_count + contextual").at_most(kHalfInt);
  Size tokens = Size("tokens").at_most(kHalfInt), hidden = Size("hidden").at_most(kHalfInt);
  FloatDtype dtype;
  View<3> grad;
  View<2> slots;

  MergeGradientArguments(const Tensor& grad_tensor, const Tensor& slots_tensor, int64_t contextual)
      : grad("grad_tokens", grad_tensor, {batch, merged_count, hidden}, dtype),
        slots("slots", slots_tensor, {batch, tokens}, Dtype::kInt32) {
    check_within("contextual", contextual, 0, merged_count);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                              \
  OP(top_tokens, "(Tensor scores, SymInt k) -> Tensor")                                                              \
  OP(merge_slots, "(Tensor metric, Tensor kept, SymInt contextual) -> Tensor")                                       \
  OP(merge_rows, "(Tensor hidden, Tensor kept, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor") \
  OP(merge_rows_backward, "(Tensor grad_tokens, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor")
