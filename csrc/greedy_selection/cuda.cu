// Greedy choices on CUDA. vlmfast/ops/greedy_selection/definition.py defines what is computed.
//
// A choice is a chain of k steps, each of which needs the one before it. One block per image takes the steps, so what
// counts is the time of a step, what it reads and how long its reductions take, rather than the bytes of a call.
//   farthest    A first kernel computes the Gram matrices: for five crops of 576 tokens of 1024 elements, 405 blocks do
//               3.4 GFLOP on tensor cores and write 6.6 MB of float32, which stay in the L2 cache. The first step reads
//               the 1.3 MB of a crop, which one multiprocessor does slowly. Each further one reads a row, 2.3 KB, and
//               does two warp reductions with one barrier.
//   dpp_map     The same matrices. A step reads a row and the shares of all earlier choices, for the 64th of 576 tokens
//               147 KB from the L2 cache.
//   coverage    The first step reads all of the similarity, 0.7 MB of half precision for 576 tokens. In each further
//               one, 16 warps each read the rows of some tokens, 1.2 KB each, with two warp reductions per token and
//               two barriers.
// No launch waits for the host or has a shape that depends on data, so a CUDA graph can capture them.
#include "greedy_selection/coverage.cuh"
#include "greedy_selection/dpp_map.cuh"
#include "greedy_selection/farthest.cuh"
#include "greedy_selection/gram.cuh"
#include "greedy_selection/ops.h"

namespace vlmfast {
namespace {

// Writes the Gram matrices, (batch, tokens, longest), into a buffer, and returns the buffer's data.
float* gram(const DeviceScope& scope, const View<3>& features, const Images& images, const Tensor& buffer) {
  float* const products = scope.output<float>(buffer);
  const GramPolicy policy(images, features.size(2));
  const bool in_vectors = vectors_fit(kVectorBytes, features);
  with_dtype(features.dtype(), [&](auto zero) {
    using scalar_t = decltype(zero);
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    launch_blocks(scope, in_vectors ? gram_kernel<scalar_t, kVec> : gram_kernel<scalar_t, 1>, policy.blocks,
                  GramPolicy::kThreads, sizeof(GramTile<scalar_t>), scope.input<scalar_t>(features), products, images,
                  policy);
  });
  return products;
}

// Chooses by the Gram matrices. The kernel's state has `size` floats; `last` are its last arguments.
template <typename Kernel, typename... Last>
Tensor choose(Kernel kernel, int64_t size, const FeatureArguments& args, const Tensor& features_tensor, int64_t k,
              Last... last) {
  Tensor chosen = allocate({args.batch, k}, features_tensor, Dtype::kInt64);
  if (args.batch * args.tokens == 0) return chosen;
  const DeviceScope scope(features_tensor);
  const Images images(scope, args.images, args.batch, args.tokens, k);
  const Tensor buffer = float_buffer(args.batch * args.tokens * images.longest, features_tensor);
  const float* const products = gram(scope, args.features, images, buffer);
  const Tensor state = float_buffer(size, features_tensor);
  launch_blocks(scope, kernel, images.count, GreedyPolicy::kThreads, 0, products, as_weights(scope, args.quality),
                scope.output<float>(state), scope.output<int64_t>(chosen), images, last...);
  return chosen;
}

Tensor farthest(const Tensor& features, int64_t k, const std::optional<Tensor>& quality, bool first_by_quality,
                const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_kept, int64_t longest) {
  const FeatureArguments args(features, k, quality, "quality", cu_seqlens, cu_kept, longest);
  return choose(farthest_kernel, args.batch * FarthestState::kRows * args.tokens, args, features, k, first_by_quality);
}

Tensor dpp_map(const Tensor& features, int64_t k, const std::optional<Tensor>& relevance,
               const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_kept, int64_t longest) {
  const FeatureArguments args(features, k, relevance, "relevance", cu_seqlens, cu_kept, longest);
  return choose(dpp_map_kernel, DppState::size(args, k), args, features, k);
}

Tensor coverage(const Tensor& similarity_tensor, int64_t k, const std::optional<Tensor>& row_weights_tensor,
                const std::optional<Tensor>& quality_tensor, const std::optional<Tensor>& cu_seqlens,
                const std::optional<Tensor>& cu_kept, int64_t longest) {
  const CoverageArguments args(similarity_tensor, k, row_weights_tensor, quality_tensor, cu_seqlens, cu_kept, longest);
  Tensor chosen = allocate({args.batch, k}, similarity_tensor, Dtype::kInt64);
  if (args.batch * args.tokens == 0) return chosen;
  const DeviceScope scope(similarity_tensor);
  const Images images(scope, args.images, args.batch, args.tokens, k);
  const Tensor state = float_buffer(CoverageState::size(args), similarity_tensor);
  with_dtype(args.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    launch_blocks(scope, coverage_kernel<scalar_t>, images.count, GreedyPolicy::kThreads, 0,
                  scope.input<scalar_t>(args.similarity), as_weights(scope, args.row_weights),
                  as_weights(scope, args.quality), scope.output<float>(state), scope.output<int64_t>(chosen), images,
                  static_cast<int>(args.rows));
  });
  return chosen;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
