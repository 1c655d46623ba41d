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

// The images that tokens are chosen from: each row of tokens is one, or one row has several of different sizes.
struct ImageArguments {
  Size bounds{"images + 1"};
  View<1> cu_seqlens, cu_kept;
  int64_t count, longest;  // the images, and the most tokens of one

  ImageArguments(int64_t batch, int64_t tokens, int64_t k, const std::optional<Tensor>& cu_seqlens_tensor,
                 const std::optional<Tensor>& cu_kept_tensor, int64_t longest_given)
      : bounds(Size("images + 1").at_least(1)),
        cu_seqlens("cu_seqlens", cu_seqlens_tensor, {bounds}, Dtype::kInt32),
        cu_kept("cu_kept", cu_kept_tensor, {bounds}, Dtype::kInt32),
        count(cu_seqlens_tensor.has_value() ? bounds - 1 : batch),
        longest(cu_seqlens_tensor.has_value() ? longest_given : tokens) {
    check_within("k", k, 0, tokens);
    check_within("longest", longest_given, 0, tokens);
    STD_TORCH_CHECK(cu_seqlens_tensor.has_value() == cu_kept_tensor.has_value(),
                    "cu_seqlens and cu_kept must be given together, got one of them");
    STD_TORCH_CHECK(!cu_seqlens_tensor.has_value() || batch == 1,
                    "with cu_seqlens the images must be in one row, got a batch of ", batch);
    STD_TORCH_CHECK(!cu_seqlens_tensor.has_value() || longest * count >= tokens,
                    "longest must be the most tokens of an image, of ", count, " with ", tokens, " tokens, got ",
                    longest);
  }
};

struct FeatureArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMost), size = Size("features").at_most(kMost);
  FloatDtype dtype, quality_dtype;
  View<3> features;
  View<2> quality;
  ImageArguments images;

  template <class... Bounds>
  FeatureArguments(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& quality_tensor,
                   const char* quality_name, const Bounds&... bounds)
      : features("features", features_tensor, {batch, tokens, size}, dtype),
        quality(quality_name, quality_tensor, {batch, tokens}, quality_dtype),
        images(batch, tokens, k, bounds...) {}
};

struct CoverageArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMost), rows = Size("rows").at_most(kMost), count{"images"};
  FloatDtype dtype, weight_dtype, quality_dtype;
  View<3> similarity;
  ImageArguments images;
  View<2> row_weights, quality;

  template <class... Bounds>
  CoverageArguments(const Tensor& similarity_tensor, int64_t k, const std::optional<Tensor>& row_weights_tensor,
                    const std::optional<Tensor>& quality_tensor, const Bounds&... bounds)
      : similarity("similarity", similarity_tensor, {batch, tokens, rows}, dtype),
        images(batch, tokens, k, bounds...),
        quality("quality", quality_tensor, {batch, tokens}, quality_dtype) {
    count.bind(images.count);
    row_weights = View<2>("row_weights", row_weights_tensor, {count, rows}, weight_dtype);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                        \
  OP(farthest,                                                                                                 \
     "(Tensor features, SymInt k, Tensor? quality=None, bool first_by_quality=True, Tensor? cu_seqlens=None, " \
     "Tensor? cu_kept=None, SymInt longest=0) -> Tensor")                                                      \
  OP(coverage,                                                                                                 \
     "(Tensor similarity, SymInt k, Tensor? row_weights=None, Tensor? quality=None, Tensor? cu_seqlens=None, " \
     "Tensor? cu_kept=None, SymInt longest=0) -> Tensor")                                                      \
  OP(dpp_map,                                                                                                  \
     "(Tensor features, SymInt k, Tensor? relevance=None, Tensor? cu_seqlens=None, Tensor? cu_kept=None, "     \
     "SymInt longest=0) -> Tensor")
