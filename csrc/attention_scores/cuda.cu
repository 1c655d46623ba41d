// How much attention visual tokens get, on CUDA: the CLS row of a map, and the sums of the columns of one that is never
// stored. vlmfast/ops/attention_scores/definition.py defines what is computed.
//
//   cls_attention        two launches, bound by memory: the logits go out and in again through the L2 cache. For the five
//                        crops of LLaVA-NeXT (5.9 MB) 400 blocks have 4 keys in flight for every 8 threads, and the
//                        second launch 25 blocks with 16 numbers to add in each thread.
//   received_attention   three launches, bound by arithmetic: in half precision on tensor cores (mma.sync m16n8k16 with
//                        sums in float32). Queries and keys come tokens / 128 times from the L2 cache.
// Segments are found on the device: a block of 128 rows looks at the tiles of the segments that its rows are in. Every
// sum is in one order, nothing waits for the host or has a shape that depends on data, so a CUDA graph may hold them.
#include <cmath>
#include <optional>

#include "attention_scores/cls_attention.cuh"
#include "attention_scores/ops.h"
#include "attention_scores/received_attention.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {
namespace {

constexpr int64_t kMost = (int64_t{1} << 30) - 1;  // elements of heads, tokens and bounds are counted in 32 bits

// Returns the factor of the logits in the exponents of two.
float exponent_factor(std::optional<double> scale, int64_t head_dim) {
  constexpr double kLog2E = 1.4426950408889634;
  return static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))) * kLog2E);
}

Tensor cls_attention(const Tensor& query_tensor, const Tensor& key_tensor, std::optional<double> scale,
                     int64_t cls_index) {
  Size batch("batch"), heads = Size("heads").at_least(1), head_dim = Size("head_dim").at_least(1).at_most(kMost);
  Size tokens = Size("tokens").at_least(1);
  FloatDtype dtype;
  const View query("query", query_tensor, {batch, heads, head_dim}, dtype);
  const View key("key", key_tensor, {batch, heads, tokens, head_dim}, dtype);
  check_within("cls_index", cls_index, -tokens, tokens - 1);
  Tensor scores = allocate({batch, tokens - 1}, key_tensor, Dtype::kFloat32);
  if (scores.numel() == 0) return scores;
  const int64_t chunks = (tokens + ClsPolicy::kChunk - 1) / ClsPolicy::kChunk, cls = (cls_index + tokens) % tokens;
  const ClsSizes sizes{batch, heads, tokens, static_cast<int>(head_dim), chunks, cls, exponent_factor(scale, head_dim)};
  const Tensor parts = float_buffer(2 * batch * heads * chunks * ClsPolicy::kParts, key_tensor);
  const Tensor logits = float_buffer(batch * heads * tokens, key_tensor);
  const DeviceScope scope(key_tensor);
  float2* const parts_data = scope.output<float2>(parts);
  float* const logits_data = scope.output<float>(logits);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    check_cuda(launch(cls_logits_kernel<scalar_t, decltype(policy)>, dim3(std::min(batch * heads * chunks, kMaxBlocks)),
                      dim3(ClsPolicy::kThreads), 0, scope.stream(), scope.input<scalar_t>(query),
                      scope.input<scalar_t>(key), parts_data, logits_data, sizes));
  };
  with_row_policy<HeadRow, LongHeadRow>(dtype, head_dim, vectors_fit(kVectorBytes, query, key), run);
  check_cuda(launch(cls_scores_kernel, dim3(std::min(batch * chunks, kMaxBlocks)), dim3(ClsPolicy::kThreads), 0,
                    scope.stream(), parts_data, logits_data, scope.output<float>(scores), sizes));
  return scores;
}

Tensor received_attention(const Tensor& query_tensor, const Tensor& key_tensor, const std::optional<Tensor>& cu_seqlens,
                          int64_t group, std::optional<double> scale) {
  Size heads = Size("heads").at_least(1), head_dim = Size("head_dim").at_least(1).at_most(kMost);
  Size tokens = Size("tokens").at_most(kMost);
  Size bounds = Size("segments + 1").at_most(kMost);
  FloatDtype dtype;
  const View query("query", query_tensor, {heads, tokens, head_dim}, dtype);
  const View key("key", key_tensor, {heads, tokens, head_dim}, dtype);
  const View seqlens("cu_seqlens", cu_seqlens, {bounds}, Dtype::kInt32);
  STD_TORCH_CHECK(group >= 1 && tokens % group == 0, "group must divide the ", tokens, " tokens, got ", group);
  const int64_t groups = tokens / group;
  Tensor scores = allocate({groups}, key_tensor, Dtype::kFloat32);
  if (groups == 0) return scores;
  const Tensor normalisers = float_buffer(2 * heads * tokens, key_tensor);
  const Tensor received = float_buffer(heads * tokens, key_tensor);
  const DeviceScope scope(key_tensor);
  float2* const normalisers_data = scope.output<float2>(normalisers);
  float* const received_data = scope.output<float>(received);
  const ReceivedSizes sizes{heads,
                            static_cast<int>(tokens),
                            static_cast<int>(head_dim),
                            cu_seqlens ? static_cast<int>(bounds) : 0,
                            cu_seqlens ? scope.input<int32_t>(seqlens).data : nullptr,
                            exponent_factor(scale, head_dim)};
  with_tiles(dtype, head_dim, vectors_fit(kVectorBytes, query, key), [&](auto type) {
    using Tiles = typename decltype(type)::type;
    using scalar_t = typename Tiles::scalar_t;
    const auto queries = scope.input<scalar_t>(query), keys = scope.input<scalar_t>(key);
    const int64_t blocks = heads * ((tokens + Tiles::kOwnRows - 1) / Tiles::kOwnRows);
    const dim3 grid(std::min(blocks, kMaxBlocks)), block(Tiles::kThreads);
    constexpr size_t kShared = sizeof(ReceivedShared<Tiles>);
    check_cuda(launch(received_pass_kernel<Tiles, RowNormalisers>, grid, block, kShared, scope.stream(), queries, keys,
                      static_cast<const float2*>(nullptr), normalisers_data, sizes));
    check_cuda(launch(received_pass_kernel<Tiles, ReceivedSums>, grid, block, kShared, scope.stream(), keys, queries,
                      normalisers_data, received_data, sizes));
  });
  const int64_t blocks = (groups + MeanPolicy::kThreads - 1) / MeanPolicy::kThreads;
  check_cuda(launch(received_mean_kernel, dim3(std::min(blocks, kMaxBlocks)), dim3(MeanPolicy::kThreads), 0,
                    scope.stream(), received_data, scope.output<float>(scores), heads, groups, group));
  return scores;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
