// How much attention visual tokens get, on CUDA: the CLS row of a map, and the sums of the columns of one that is never
// stored. vlmfast/ops/attention_scores.py defines what is computed.
//
// For B images, H heads of D elements of s bytes and T tokens,
//   cls_attention        two launches: B H T D s bytes of keys, and the products, 4 B H T, out and in again from the L2
//                        cache. For the five crops of LLaVA-NeXT (5.9 MB) 400 blocks have 4 keys in flight for every 8
//                        threads, and the second launch 25 blocks with 16 numbers to add in each thread.
//   received_attention   three launches: 4 H T^2 D operations, in half precision on tensor cores (mma.sync m16n8k16
//   with
//                        sums in float32), and 2 H T^2 exponentials; 24 H T bytes of scratch. Queries and keys
//                        come T / 128 times from the L2 cache.
// Segments are found on the device: a block of 128 rows looks at the tiles of the segments that its rows are in. Every
// sum is in one order, nothing waits for the host or has a shape that depends on data, so a CUDA graph may hold them.
#include <cmath>
#include <optional>

#include "attention_scores/cls_attention.cuh"
#include "attention_scores/received_attention.cuh"
#include "attention_scores/ops.h"
#include "common/cuda_torch.h"

namespace vlmfast {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// The factor of the products in the exponents of two.
float exponent_factor(std::optional<double> scale, int64_t size) {
  return static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(size))) * kLog2E);
}

Tensor cls_attention(const Tensor& query_tensor, const Tensor& key_tensor, std::optional<double> scale,
                     int64_t cls_index) {
  const Images query(query_tensor);
  const Heads key(key_tensor);
  STD_TORCH_CHECK(key.batch == query.count && key.count == query.rows && key.size == query.size && key.rows >= 1,
                  "key must have shape (", query.count, ", ", query.rows, ", T, ", query.size, ") with T >= 1");
  STD_TORCH_CHECK(dtype_of(key_tensor) == dtype_of(query_tensor), "key must have the dtype of query");
  STD_TORCH_CHECK(cls_index >= -key.rows && cls_index < key.rows, "cls_index must be within -T and T - 1, got ",
                  cls_index);
  STD_TORCH_CHECK(key.size > 0 && key.size < int64_t{1} << 30, "heads must have 1 to 2^30 - 1 elements");
  const int64_t shape[] = {key.batch, key.rows - 1};
  Tensor scores = allocate(shape, 2, key_tensor, aoti_torch_dtype_float32());
  if (key.batch == 0 || key.rows == 1) return scores;
  const ClsSizes sizes{key.batch,
                       key.count,
                       key.rows,
                       key.size,
                       (key.rows + ClsPolicy::kChunk - 1) / ClsPolicy::kChunk,
                       (cls_index + key.rows) % key.rows,
                       exponent_factor(scale, key.size)};
  const int64_t heads = key.batch * key.count;
  const Tensor parts = float_buffer(2 * heads * sizes.chunks * ClsPolicy::kParts, key_tensor);
  const Tensor products = float_buffer(heads * key.rows, key_tensor);
  const DeviceScope scope(key_tensor);
  with_dtype(dtype_of(key_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto query_rows = scope.input<scalar_t>(query);
    const auto key_rows = scope.input<scalar_t>(key);
    launch_cls_attention(scope, query_rows, key_rows, scope.output<float2>(parts), scope.output<float>(products),
                         scope.output<float>(scores), sizes);
  });
  return scores;
}

Tensor received_attention(const Tensor& query_tensor, const Tensor& key_tensor,
                          const std::optional<Tensor>& cu_seqlens_tensor, int64_t group, std::optional<double> scale) {
  const Images query(query_tensor), key(key_tensor);
  STD_TORCH_CHECK(key.count == query.count && key.rows == query.rows && key.size == query.size,
                  "key must have the shape of query");
  STD_TORCH_CHECK(dtype_of(key_tensor) == dtype_of(query_tensor), "key must have the dtype of query");
  STD_TORCH_CHECK(key.size > 0 && key.size < int64_t{1} << 30, "heads must have 1 to 2^30 - 1 elements");
  STD_TORCH_CHECK(key.rows < int64_t{1} << 30, "query must have fewer than 2^30 tokens, got ", key.rows);
  STD_TORCH_CHECK(group >= 1 && key.rows % group == 0, "group must divide the ", key.rows, " tokens, got ", group);
  const int64_t groups = key.rows / group;
  Tensor scores = allocate(&groups, 1, key_tensor, aoti_torch_dtype_float32());
  if (groups == 0) return scores;
  std::optional<Rows> bounds;
  if (cu_seqlens_tensor) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(cu_seqlens_tensor->get(), &dtype));
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_int32() && cu_seqlens_tensor->dim() == 1,
                    "cu_seqlens must be int32 of shape (segments + 1,)");
    bounds.emplace(*cu_seqlens_tensor);
    STD_TORCH_CHECK(bounds->size < int64_t{1} << 30, "cu_seqlens must have fewer than 2^30 entries");
  }
  const Tensor normalisers = float_buffer(2 * key.count * key.rows, key_tensor);
  const Tensor received = float_buffer(key.count * key.rows, key_tensor);
  const DeviceScope scope(key_tensor);
  const ReceivedSizes sizes{key.count,
                            static_cast<int>(key.rows),
                            static_cast<int>(key.size),
                            bounds ? static_cast<int>(bounds->size) : 0,
                            bounds ? scope.input<int32_t>(*bounds).data : nullptr,
                            exponent_factor(scale, key.size)};
  float* const received_data = scope.output<float>(received);
  with_dtype(dtype_of(key_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto query_rows = scope.input<scalar_t>(query), key_rows = scope.input<scalar_t>(key);
    launch_received_passes_of(scope, query_rows, key_rows, scope.output<float2>(normalisers), received_data, sizes);
  });
  const int64_t blocks = (groups + MeanPolicy::kThreads - 1) / MeanPolicy::kThreads;
  check_cuda(launch(received_mean_kernel, dim3(std::min(blocks, kMaxBlocks)), dim3(MeanPolicy::kThreads), 0,
                    scope.stream(), received_data, scope.output<float>(scores), key.count, groups, group));
  return scores;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
