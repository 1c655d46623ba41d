// Patch-info mining on CUDA. vlmfast/ops/patch_mining/definition.py defines what is computed.
//
// One launch, bound by memory. An image of Mini-Gemini has a map of 212 MB, which is read twice; part of the second
// read comes from the L2 cache. A row of a block, 8 pixels in half precision, is 16 bytes, half a sector; the other
// half belongs to the next token's block, which runs at the same time and finds it in the cache.
#include "patch_mining/mining.cuh"
#include "patch_mining/ops.h"

namespace vlmfast {
namespace {

template <bool kBackward>
void run(const MiningArguments& args, const Tensor& like, int64_t scale, bool listed, double eps, const Tensor& y,
         const Tensor& grad_map) {
  check_within("scale", scale * scale, 1, MiningPolicy::kMostPixels);
  const int64_t units = kBackward ? args.total : args.tokens;
  if (args.batch * units == 0) return;
  const MiningSizes sizes{args.batch,
                          args.tokens,
                          args.channels,
                          args.height,
                          args.width,
                          args.columns,
                          args.total,
                          static_cast<int>(scale),
                          static_cast<float>(eps),
                          listed};
  const DeviceScope scope(like);
  const auto launch_with = [&](auto zero, auto vec) {
    using scalar_t = decltype(zero);
    constexpr int kVec = decltype(vec)::value;
    const MiningPolicy policy(sizes.scale, kVec);
    launch_blocks(scope, mining_kernel<scalar_t, kVec, kBackward>, args.batch * units, MiningPolicy::kThreads,
                  MiningPolicy::kRows * scale * scale * sizeof(float), scope.input<scalar_t>(args.query),
                  scope.input<scalar_t>(args.grad_output), scope.input<scalar_t>(args.feature_map),
                  scope.input<int64_t>(args.blocks), scope.output<scalar_t>(y), scope.output<scalar_t>(grad_map), sizes,
                  policy);
  };
  with_dtype(args.dtype, [&](auto zero) {
    constexpr int kVec = kVectorBytes / sizeof(zero);
    if (scale % kVec == 0 && vectors_fit(kVectorBytes, args.feature_map)) {
      launch_with(zero, std::integral_constant<int, kVec>());
    } else {
      launch_with(zero, std::integral_constant<int, 1>());
    }
  });
}

Tensor mine_patches(const Tensor& query, const Tensor& feature_map, int64_t scale, const std::optional<Tensor>& blocks,
                    double norm_eps) {
  const MiningArguments args(query, feature_map, scale, blocks);
  Tensor mined = allocate({args.batch, args.tokens, args.channels}, query, args.dtype);
  run<false>(args, query, scale, blocks.has_value(), norm_eps, mined, mined);
  return mined;
}

std::tuple<Tensor, Tensor> mine_patches_backward(const Tensor& grad_output, const Tensor& query,
                                                 const Tensor& feature_map, int64_t scale,
                                                 const std::optional<Tensor>& blocks, double norm_eps) {
  const MiningArguments args(query, feature_map, scale, blocks, grad_output);
  Tensor grad_query = allocate({args.batch, args.tokens, args.channels}, query, args.dtype);
  Tensor grad_map = allocate({args.batch, args.channels, args.height, args.width}, query, args.dtype);
  run<true>(args, query, scale, blocks.has_value(), norm_eps, grad_query, grad_map);
  return {std::move(grad_query), std::move(grad_map)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
