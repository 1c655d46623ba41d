// Token reduction on CUDA: top_tokens chooses the kept tokens, merge_slots decides where the others go, and merge_rows
// moves and merges the rows, in one launch each. vlmfast/ops/token_merge/definition.py defines what is computed.
//
// The five crops of LLaVA-NeXT (577 tokens of 1024 elements, metrics of 64, 27 kept, 5 contextual) are 6 MB of hidden
// states, which is two microseconds of traffic, so the time is that of the longest chain of dependent steps:
//   top_tokens    three steps of 256 scores and three barriers per digit; four digits in float32, two in half precision
//   merge_slots   181 blocks of 16 tokens; the position of a target and the number of a token are binary searches of
//                 log2 k loads
//   merge_rows    134 blocks; two steps find the members of a row, and 16 warps with 8 rows each in flight add them up,
//                 in four steps if 400 of the tokens join one target
// This should take a few microseconds each. Sums are accumulated in float32, in an order that depends only on the
// slots. There is no synchronisation with the host and no data-dependent shape, so the ops can be captured in a CUDA
// graph. Slots and positions that merge_slots would never produce cause no access out of bounds. A NaN score fails a
// device-side assertion.
#include "token_merge/merge_rows.cuh"
#include "token_merge/ops.h"

namespace vlmfast {
namespace {

Tensor top_tokens(const Tensor& scores_tensor, int64_t k) {
  const TopTokensArguments args(scores_tensor, k);
  Tensor kept = allocate({args.batch, k}, scores_tensor, Dtype::kInt64);
  if (args.scores.numel() == 0) return kept;
  const DeviceScope scope(scores_tensor);
  with_dtype(args.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const TopPolicy policy(args.batch, args.tokens, k, sizeof(scalar_t));
    launch_blocks(scope, top_tokens_kernel<scalar_t>, policy.batch, TopPolicy::kThreads,
                  policy.cached * sizeof(scalar_t), scope.input<scalar_t>(args.scores), scope.output<int64_t>(kept),
                  policy);
  });
  return kept;
}

Tensor merge_slots(const Tensor& metric_tensor, const Tensor& kept_tensor, int64_t contextual) {
  const MergeSlotsArguments args(metric_tensor, kept_tensor, contextual);
  Tensor slots = allocate({args.batch, args.tokens}, metric_tensor, Dtype::kInt32);
  if (slots.numel() == 0) return slots;
  const MergeSizes sizes(args.batch, args.tokens, args.hidden, args.kept_count, contextual);
  const DeviceScope scope(metric_tensor);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const SlotPolicy chunks(sizes, Policy::kRowsPerBlock, scope.multiprocessors());
    launch_blocks(scope, merge_slots_kernel<scalar_t, Policy>, args.batch * chunks.chunks, Policy::kThreads, 0,
                  scope.input<scalar_t>(args.rows), scope.input<int64_t>(args.kept), scope.output<int32_t>(slots),
                  sizes, chunks);
  };
  with_row_policy<ShortMetric, LongMetric>(args.dtype, args.hidden, vectors_fit(kVectorBytes, args.rows), run);
  return slots;
}

Tensor merge_rows(const Tensor& hidden_tensor, const Tensor& kept_tensor, const Tensor& slots_tensor,
                  int64_t contextual, Merge merge) {
  const MergeRowsArguments args(hidden_tensor, kept_tensor, slots_tensor, contextual);
  Tensor merged = allocate({args.batch, args.kept_count + contextual, args.hidden}, hidden_tensor, args.dtype);
  if (merged.numel() == 0) return merged;
  const MergeSizes sizes(args.batch, args.tokens, args.hidden, args.kept_count, contextual);
  const DeviceScope scope(hidden_tensor);
  with_row_policy<WarpRow>(args.dtype, args.hidden, vectors_fit(kVectorBytes, args.rows), [&](auto zero, auto row) {
    using scalar_t = decltype(zero);
    constexpr int kVec = decltype(row)::kVec;
    const MergePolicy policy(sizes, kVec);
    launch_blocks(scope, merge_rows_kernel<scalar_t, kVec>, policy.blocks, MergePolicy::kThreads,
                  sizeof(Members<kWarp * kVec>), scope.input<scalar_t>(args.rows), scope.input<int64_t>(args.kept),
                  scope.input<int32_t>(args.slots), scope.output<scalar_t>(merged), sizes, merge, policy);
  });
  return merged;
}

Tensor merge_rows_backward(const Tensor& grad_tensor, const Tensor& slots_tensor, int64_t contextual, Merge merge) {
  const MergeGradientArguments args(grad_tensor, slots_tensor, contextual);
  Tensor grad_hidden = allocate({args.batch, args.tokens, args.hidden}, grad_tensor, args.dtype);
  if (grad_hidden.numel() == 0) return grad_hidden;
  const MergeSizes sizes(args.batch, args.tokens, args.hidden, args.merged_count - contextual, contextual);
  const DeviceScope scope(grad_tensor);
  const MergeBackwardPolicy policy(sizes, scope.multiprocessors());
  with_row_policy<WarpRow>(args.dtype, args.hidden, vectors_fit(kVectorBytes, args.grad), [&](auto zero, auto row) {
    using scalar_t = decltype(zero);
    launch_blocks(scope, merge_rows_backward_kernel<scalar_t, decltype(row)::kVec>, policy.blocks,
                  MergePolicy::kThreads, policy.shared_bytes, scope.input<scalar_t>(args.grad),
                  scope.input<int32_t>(args.slots), scope.output<scalar_t>(grad_hidden), sizes, merge, policy);
  });
  return grad_hidden;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
