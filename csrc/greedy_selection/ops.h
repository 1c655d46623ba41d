// The arguments and schemas of the greedy choices. vlmfast/ops/greedy_selection/definition.py defines what the ops
// compute.
#pragma once

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

constexpr int64_t kMost = 1 << 20;  // tokens and elements of a row, which are counted in 32 bits

constexpr float kSame = 0x1p-20f;  // a smaller distance is a rounding error
// A smaller rest of a token's unit square is a rounding error.
constexpr float kNothingNew = 0x1p-14f;

struct FeatureArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMost), size = Size("features").at_most(kMost);
  FloatDtype dtype, quality_dtype;
  View<3> features;
  View<2> quality;

  FeatureArguments(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& quality_tensor,
                   const char* quality_name)
      : features("features", features_tensor, {batch, tokens, size}, dtype),
        quality(quality_name, quality_tensor, {batch, tokens}, quality_dtype) {
    check_within("k", k, 0, tokens);
  }
};

struct CoverageArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMost), rows = Size("rows").at_most(kMost);
  FloatDtype dtype, weight_dtype, quality_dtype;
  View<3> similarity;
  View<2> row_weights, quality;

  CoverageArguments(const Tensor& similarity_tensor, int64_t k, const std::optional<Tensor>& row_weights_tensor,
                    const std::optional<Tensor>& quality_tensor)
      : similarity("similarity", similarity_tensor, {batch, tokens, rows}, dtype),
        row_weights("row_weights", row_weights_tensor, {batch, rows}, weight_dtype),
        quality("quality", quality_tensor, {batch, tokens}, quality_dtype) {
    check_within("k", k, 0, tokens);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                   \
  OP(farthest, "(Tensor features, SymInt k, Tensor? quality=None, bool first_by_quality=True) -> Tensor") \
  OP(coverage, "(Tensor similarity, SymInt k, Tensor? row_weights=None, Tensor? quality=None) -> Tensor") \
  OP(dpp_map, "(Tensor features, SymInt k, Tensor? relevance=None) -> Tensor")
