// Token reduction on CUDA: the best tokens of each row, where the others go, and the tokens themselves.
// vlmfast/ops/token_merge.py defines what is computed.
//
// One launch each, three for VisionZip of a whole batch. For B crops of N tokens of D elements of s bytes, k of them
// kept and C contextual ones, metrics of M elements, they move
//   top_tokens            B (N s + 8 k)               a block per row; up to 40 KiB of keys stay in shared memory
//   merge_slots           B (N M s + 4 N)             and C M s more for each block, from the L2 cache
//   merge_rows            B (N + k + 2 C) D s         each token is read once, by the contextual row that it joins
//   merge_rows_backward   B (N + k + C) D s           a gradient that many tokens share comes again from the caches
// and 4 to 8 bytes a token of numbers. The five crops of LLaVA-NeXT (N 577, D 1024, M 64, k 27, C 5) are 6 MB of hidden
// states, two microseconds of traffic, so what counts is how long the longest chain is:
//   top_tokens    three steps of 256 scores, four times for float32 (twice for half precision), and 3 barriers each
//   time merge_slots   181 blocks of 16 tokens; a target's place and a token's number are searches of log2 k loads
//   merge_rows    134 blocks; two steps find the members of a row, 16 warps with 8 rows each in flight add them up:
//   four
//                 steps where 400 of the tokens join one target
// which is a few microseconds each. Sums are in float32 and in an order that depends on the slots alone. Nothing waits
// for the host or has a shape that depends on data, so a CUDA graph may hold them. Numbers that no merge_slots would
// give are never followed out of bounds. A score that is NaN trips a device-side assertion.
#include <optional>
#include <utility>

#include "common/cuda_torch.h"
#include "common/token_choice.cuh"
#include "token_merge/ops.h"
#include "token_merge/token_rows.cuh"
#include "token_merge/token_slots.cuh"

namespace vlmfast {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 30;  // of a crop: positions and slots are counted in 32 bits

void check_tokens(int64_t tokens) {
  STD_TORCH_CHECK(tokens < kMostTokens, "a row must have fewer than 2^30 tokens, got ", tokens);
}

// A (B, count) tensor of integers, its rows one stride apart.
Rows numbers(const char* name, const Tensor& tensor, int32_t dtype, int64_t crops, int64_t count) {
  int32_t found;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &found));
  STD_TORCH_CHECK(found == dtype, name, " is of the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.sizes()[0] == crops && tensor.sizes()[1] == count, name,
                  " must have shape (", crops, ", ", count, ")");
  return Rows(tensor);
}

Rows kept_positions(const Tensor& kept, const Images& tokens) {
  STD_TORCH_CHECK(kept.dim() == 2 && kept.sizes()[1] <= tokens.rows,
                  "kept must have shape (B, k) with k <= ", tokens.rows);
  return numbers("kept", kept, aoti_torch_dtype_int64(), tokens.count, kept.sizes()[1]);
}

void check_contextual(int64_t contextual, int64_t most) {
  STD_TORCH_CHECK(contextual >= 0 && contextual <= most, "contextual must be within 0 and ", most, ", got ",
                  contextual);
}

Tensor top_tokens(const Tensor& scores_tensor, int64_t k) {
  STD_TORCH_CHECK(scores_tensor.dim() == 2, "scores must have shape (B, N), got ", scores_tensor.dim(), " dimensions");
  const Rows scores(scores_tensor);
  STD_TORCH_CHECK(k >= 0 && k <= scores.size, "k must be within 0 and ", scores.size, ", got ", k);
  check_tokens(scores.size);
  const int64_t sizes[] = {scores.count, k};
  Tensor chosen = allocate(sizes, 2, scores_tensor, aoti_torch_dtype_int64());
  if (scores.count * scores.size == 0) return chosen;
  const DeviceScope scope(scores_tensor);
  with_dtype(dtype_of(scores_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = scope.input<scalar_t>(scores);
    launch_top_tokens(scope, rows, scores.count, scores.size, k, scope.output<int64_t>(chosen));
  });
  return chosen;
}

Tensor merge_slots(const Tensor& metric_tensor, const Tensor& kept_tensor, int64_t contextual) {
  const Images metric(metric_tensor);
  const Rows kept = kept_positions(kept_tensor, metric);
  check_contextual(contextual, metric.rows - kept.size);
  check_tokens(metric.rows);
  STD_TORCH_CHECK(metric.size < int64_t{1} << 30, "metric must have fewer than 2^30 columns");
  const int64_t sizes[] = {metric.count, metric.rows};
  Tensor slots = allocate(sizes, 2, metric_tensor, aoti_torch_dtype_int32());
  if (metric.count * metric.rows == 0) return slots;
  const DeviceScope scope(metric_tensor);
  with_dtype(dtype_of(metric_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = scope.input<scalar_t>(metric);
    launch_merge_slots(scope, rows, scope.input<int64_t>(kept), metric.count, metric.rows, kept.size, contextual,
                       metric.size, scope.output<int32_t>(slots));
  });
  return slots;
}

// function(a number of elements) for vectors of 16 bytes where the rows of x allow it, else for one element.
template <typename scalar_t, typename Function>
void with_vectors(const ImagePointer<scalar_t>& x, int64_t hidden, Function&& function) {
  if (!vectors_fit(kVectorBytes, hidden, {x.rows(), x.images()})) return function(std::integral_constant<int, 1>());
  function(std::integral_constant<int, kVectorBytes / sizeof(scalar_t)>());
}

Tensor merge_rows(const Tensor& hidden_tensor, const Tensor& kept_tensor, const Tensor& slots_tensor,
                  int64_t contextual, Merge merge) {
  const Images hidden(hidden_tensor);
  const Rows kept = kept_positions(kept_tensor, hidden);
  const Rows slots = numbers("slots", slots_tensor, aoti_torch_dtype_int32(), hidden.count, hidden.rows);
  check_contextual(contextual, hidden.rows - kept.size);
  check_tokens(hidden.rows);
  const int64_t sizes[] = {hidden.count, kept.size + contextual, hidden.size};
  Tensor merged = allocate(sizes, 3, hidden_tensor);
  if (sizes[0] * sizes[1] * sizes[2] == 0) return merged;
  const DeviceScope scope(hidden_tensor);
  const MergeSizes call{hidden.count,
                        hidden.size,
                        static_cast<int>(hidden.rows),
                        static_cast<int>(kept.size),
                        static_cast<int>(contextual),
                        merge};
  with_dtype(dtype_of(hidden_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = scope.input<scalar_t>(hidden);
    const auto positions = scope.input<int64_t>(kept);
    const auto numbers = scope.input<int32_t>(slots);
    scalar_t* const merged_data = scope.output<scalar_t>(merged);
    with_vectors(rows, hidden.size, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const MergePolicy policy(call, kVec);
      check_cuda(launch(merge_rows_kernel<scalar_t, kVec>, dim3(std::min<int64_t>(policy.blocks, kMaxBlocks)),
                        dim3(MergePolicy::kThreads), sizeof(Members<kWarp * kVec>), scope.stream(), rows, positions,
                        numbers, merged_data, call, policy));
    });
  });
  return merged;
}

Tensor merge_rows_backward(const Tensor& grad_tensor, const Tensor& slots_tensor, int64_t contextual, Merge merge) {
  const Images grad(grad_tensor);
  STD_TORCH_CHECK(slots_tensor.dim() == 2, "slots must have shape (B, N), got ", slots_tensor.dim(), " dimensions");
  const int64_t tokens = slots_tensor.sizes()[1];
  const Rows slots = numbers("slots", slots_tensor, aoti_torch_dtype_int32(), grad.count, tokens);
  check_contextual(contextual, grad.rows);
  check_tokens(tokens);
  check_tokens(grad.rows);
  const int64_t sizes[] = {grad.count, tokens, grad.size};
  Tensor grad_hidden = allocate(sizes, 3, grad_tensor);
  if (sizes[0] * sizes[1] * sizes[2] == 0) return grad_hidden;
  const DeviceScope scope(grad_tensor);
  const MergeSizes call{grad.count,
                        grad.size,
                        static_cast<int>(tokens),
                        static_cast<int>(grad.rows - contextual),
                        static_cast<int>(contextual),
                        merge};
  with_dtype(dtype_of(grad_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = scope.input<scalar_t>(grad);
    const auto numbers = scope.input<int32_t>(slots);
    scalar_t* const grad_data = scope.output<scalar_t>(grad_hidden);
    const MergeBackwardPolicy policy(call, scope.multiprocessors());
    with_vectors(rows, grad.size, [&](auto vec) {
      check_cuda(launch(merge_rows_backward_kernel<scalar_t, decltype(vec)::value>,
                        dim3(std::min(call.crops * policy.per_crop, kMaxBlocks)), dim3(MergePolicy::kThreads),
                        policy.shared_bytes, scope.stream(), rows, numbers, grad_data, call, policy));
    });
  });
  return grad_hidden;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
