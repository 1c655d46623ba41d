// The attention that visual tokens receive, on CUDA: one row of an attention map, or the column sums of a whole map,
// which is never stored. vlmfast/ops/attention_scores/definition.py defines what is computed.
//
//   cls_attention, last_row_attention
//                        Two launches, bound by memory; the logits pass through the L2 cache in between. For the five
//                        crops of LLaVA-NeXT (5.9 MB) the first launch has 400 blocks with 4 keys in flight per 8
//                        threads, the second 25 blocks in which each thread adds 16 numbers.
//   received_attention   Three launches, bound by arithmetic. Half precision uses tensor cores (mma.sync m16n8k16 with
//                        float32 accumulation). Queries and keys are read tokens / 128 times from the L2 cache.
// Segments are found on the device: a block of 128 rows visits only the tiles of the segments of its rows. All sums are
// deterministic, and there is no synchronisation with the host and no data-dependent shape, so the ops can be captured
// in a CUDA graph.
#include <cmath>
#include <optional>

#include "attention_scores/ops.h"
#include "attention_scores/received_attention.cuh"
#include "attention_scores/row_attention.cuh"

namespace vlmfast {
namespace {

// Returns the factor from dots to exponents of 2.
float exponent_factor(std::optional<double> scale, int64_t head_dim) {
  constexpr double kLog2E = 1.4426950408889634;
  return static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))) * kLog2E);
}

// Sums one token's row of the attention map over the heads, without the column `left_out`, and divides by parts_count.
template <class Arguments>
Tensor row_attention(const Arguments& args, int64_t key_heads, const Tensor& like, std::optional<double> scale,
                     const View<2>& valid, int64_t left_out, int64_t parts_count) {
  const int64_t batch = args.batch, heads = args.heads, tokens = args.tokens;
  Tensor scores = allocate({batch, tokens - (left_out < tokens)}, like, Dtype::kFloat32);
  if (scores.numel() == 0) return scores;
  const int64_t chunks = (tokens + RowAttentionPolicy::kChunk - 1) / RowAttentionPolicy::kChunk;
  const Tensor parts = float_buffer(2 * batch * heads * chunks * RowAttentionPolicy::kParts, like);
  const Tensor logits = float_buffer(batch * heads * tokens, like);
  const DeviceScope scope(like);
  const RowSizes sizes{batch,
                       heads,
                       tokens,
                       static_cast<int>(args.head_dim),
                       heads / key_heads,
                       chunks,
                       left_out,
                       exponent_factor(scale, args.head_dim),
                       static_cast<float>(parts_count),
                       valid ? scope.input<uint8_t>(valid).data : nullptr,
                       valid.stride(0)};
  float2* const parts_data = scope.output<float2>(parts);
  float* const logits_data = scope.output<float>(logits);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    launch_blocks(scope, row_logits_kernel<scalar_t, decltype(policy)>, batch * heads * chunks,
                  RowAttentionPolicy::kThreads, 0, scope.input<scalar_t>(args.query), scope.input<scalar_t>(args.key),
                  parts_data, logits_data, sizes);
  };
  const bool fit = vectors_fit(kVectorBytes, args.query, args.key);
  with_row_policy<HeadRow, LongHeadRow>(args.dtype, args.head_dim, fit, run);
  launch_blocks(scope, row_scores_kernel, batch * chunks, RowAttentionPolicy::kThreads, 0, parts_data, logits_data,
                scope.output<float>(scores), sizes);
  return scores;
}

Tensor cls_attention(const Tensor& query_tensor, const Tensor& key_tensor, std::optional<double> scale,
                     int64_t cls_index) {
  const ClsArguments args(query_tensor, key_tensor, cls_index);
  return row_attention(args, args.heads, key_tensor, scale, View<2>(), args.cls, 1);
}

Tensor last_row_attention(const Tensor& query_tensor, const Tensor& key_tensor,
                          const std::optional<Tensor>& valid_tensor, std::optional<double> scale) {
  const LastRowArguments args(query_tensor, key_tensor, valid_tensor);
  return row_attention(args, args.key_heads, key_tensor, scale, args.valid, args.tokens, args.heads);
}

Tensor received_attention(const Tensor& query_tensor, const Tensor& key_tensor, const std::optional<Tensor>& cu_seqlens,
                          int64_t group, std::optional<double> scale) {
  const ReceivedArguments args(query_tensor, key_tensor, cu_seqlens, group);
  const int64_t heads = args.heads, tokens = args.tokens;
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
                            static_cast<int>(args.head_dim),
                            cu_seqlens ? static_cast<int>(args.bounds) : 0,
                            cu_seqlens ? scope.input<int32_t>(args.cu_seqlens).data : nullptr,
                            exponent_factor(scale, args.head_dim)};
  with_tiles(args.dtype, args.head_dim, vectors_fit(kVectorBytes, args.query, args.key), [&](auto type) {
    using Tiles = typename decltype(type)::type;
    using scalar_t = typename Tiles::scalar_t;
    const auto queries = scope.input<scalar_t>(args.query), keys = scope.input<scalar_t>(args.key);
    const int64_t blocks = heads * ((tokens + Tiles::kOwnRows - 1) / Tiles::kOwnRows);
    constexpr size_t kShared = sizeof(ReceivedShared<Tiles>);
    launch_blocks(scope, received_pass_kernel<Tiles, RowNormalisers>, blocks, Tiles::kThreads, kShared, queries, keys,
                  static_cast<const float2*>(nullptr), normalisers_data, sizes);
    launch_blocks(scope, received_pass_kernel<Tiles, ReceivedSums>, blocks, Tiles::kThreads, kShared, keys, queries,
                  normalisers_data, received_data, sizes);
  });
  launch_blocks(scope, received_mean_kernel, (groups + kMeanThreads - 1) / kMeanThreads, kMeanThreads, 0, received_data,
                scope.output<float>(scores), heads, groups, group);
  return scores;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
