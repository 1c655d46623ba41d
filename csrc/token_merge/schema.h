// The choice and the merging of tokens as torch sees them; vlmfast/ops/token_merge.py defines what they compute.
#pragma once

namespace vlmfast {

inline constexpr const char kTopTokensSchema[] = "top_tokens(Tensor scores, SymInt k) -> Tensor";

inline constexpr const char kMergeSlotsSchema[] =
    "merge_slots(Tensor metric, Tensor kept, SymInt contextual) -> Tensor";

inline constexpr const char kMergeRowsSchema[] =
    "merge_rows(Tensor hidden, Tensor kept, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor";

inline constexpr const char kMergeRowsBackwardSchema[] =
    "merge_rows_backward(Tensor grad_tokens, Tensor slots, SymInt contextual, str merge=\"reference\") -> Tensor";

}  // namespace vlmfast
