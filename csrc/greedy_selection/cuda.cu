// The greedy choices on CUDA. vlmfast/ops/greedy_selection/definition.py defines what is computed.
//
// A choice is a chain of k steps, each of which waits for the one before it: one block walks along it, for each image.
// So what counts is what a step reads and how long its reductions take, not the bytes of a call.
//   farthest    first the products of all tokens: five crops of 576 tokens of 1024 elements are 405 blocks of tensor
//               cores, 3.4 GFLOP, and 6.6 MB of float32 that stay in the L2 cache. The first token looks at all 1.3 MB of
//               its crop, at what one multiprocessor can read; each further one at a row of them, 2.3 KB, and at two
//               warp reductions behind one barrier.
//   dpp_map     the same products; each token costs a row of them, and of the shares of all before it what one thread
//               after the other reads: of the 64th of 576 tokens 147 KB, from the L2 cache.
//   coverage    the first step reads all of the similarity, 0.7 MB of half precision for 576 tokens; each further one the
//               rows of some tokens for each of 16 warps, 1.2 KB each, at two warp reductions a token and two barriers.
// Nothing waits for the host or has a shape that depends on data, so a CUDA graph may hold them.
#include "greedy_selection/coverage.cuh"
#include "greedy_selection/dpp_map.cuh"
#include "greedy_selection/farthest.cuh"
#include "greedy_selection/gram.cuh"
#include "greedy_selection/ops.h"

namespace vlmfast {
namespace {

// Writes the products of each two tokens of an image, (batch, tokens, tokens), into a buffer, and returns its numbers.
float* gram(const DeviceScope& scope, const View<3>& features, const Tensor& buffer) {
  float* const products = scope.output<float>(buffer);
  const GramPolicy policy(features.size(0), features.size(1), features.size(2));
  const bool in_vectors = vectors_fit(kVectorBytes, features);
  with_dtype(features.dtype(), [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    launch_blocks(scope, in_vectors ? gram_kernel<scalar_t, kVec> : gram_kernel<scalar_t, 1>, policy.blocks,
                  GramPolicy::kThreads, sizeof(GramTile<scalar_t>), scope.input<scalar_t>(features), products, policy);
  });
  return products;
}

Tensor farthest(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& quality_tensor,
                bool first_by_quality) {
  const FeatureArguments args(features_tensor, k, quality_tensor, "quality");
  Tensor chosen = allocate({args.batch, k}, features_tensor, Dtype::kInt64);
  if (args.batch * args.tokens == 0) return chosen;
  const DeviceScope scope(features_tensor);
  const Tensor buffer = float_buffer(args.batch * args.tokens * args.tokens, features_tensor);
  const float* const products = gram(scope, args.features, buffer);
  const Tensor state = float_buffer(args.batch * FarthestState::kRows * args.tokens, features_tensor);
  const GreedyPolicy policy(args.batch, args.tokens, k);
  launch_blocks(scope, farthest_kernel, policy.batch, GreedyPolicy::kThreads, 0, products,
                as_weights(scope, args.quality), scope.output<float>(state), scope.output<int64_t>(chosen), policy,
                first_by_quality);
  return chosen;
}

Tensor dpp_map(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& relevance_tensor) {
  const FeatureArguments args(features_tensor, k, relevance_tensor, "relevance");
  Tensor chosen = allocate({args.batch, k}, features_tensor, Dtype::kInt64);
  if (args.batch * args.tokens == 0) return chosen;
  const DeviceScope scope(features_tensor);
  const Tensor buffer = float_buffer(args.batch * args.tokens * args.tokens, features_tensor);
  const float* const products = gram(scope, args.features, buffer);
  const Tensor state = float_buffer(args.batch * DppState::size(args.tokens, k), features_tensor);
  const GreedyPolicy policy(args.batch, args.tokens, k);
  launch_blocks(scope, dpp_map_kernel, policy.batch, GreedyPolicy::kThreads, 0, products,
                as_weights(scope, args.quality), scope.output<float>(state), scope.output<int64_t>(chosen), policy);
  return chosen;
}

Tensor coverage(const Tensor& similarity_tensor, int64_t k, const std::optional<Tensor>& row_weights_tensor,
                const std::optional<Tensor>& quality_tensor) {
  const CoverageArguments args(similarity_tensor, k, row_weights_tensor, quality_tensor);
  Tensor chosen = allocate({args.batch, k}, similarity_tensor, Dtype::kInt64);
  if (args.batch * args.tokens == 0) return chosen;
  const DeviceScope scope(similarity_tensor);
  const Tensor state = float_buffer(args.batch * CoverageState::size(args.tokens, args.rows), similarity_tensor);
  const GreedyPolicy policy(args.batch, args.tokens, k);
  with_dtype(args.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_blocks(scope, coverage_kernel<scalar_t>, policy.batch, GreedyPolicy::kThreads, 0,
                  scope.input<scalar_t>(args.similarity), as_weights(scope, args.row_weights),
                  as_weights(scope, args.quality), scope.output<float>(state), scope.output<int64_t>(chosen), policy,
                  static_cast<int>(args.rows));
  });
  return chosen;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
