// Decides where each token goes, in one launch: it is kept, is the target of a contextual token, or joins the
// contextual token whose target is nearest. Blocks do not communicate: binary searches in the ascending kept positions
// give the number of a token among the others, and the position of a target.
#pragma once

#include <algorithm>

#include "common/row_policy.cuh"

namespace vlmfast {

struct MergeSizes {
  int64_t batch, hidden;               // hidden: elements of a row of hidden states or of the metric
  int tokens, kept_count, contextual;  // per sequence

  MergeSizes(int64_t batch, int64_t tokens, int64_t hidden, int64_t kept_count, int64_t contextual)
      : batch(batch),
        hidden(hidden),
        tokens(static_cast<int>(tokens)),
        kept_count(static_cast<int>(kept_count)),
        contextual(static_cast<int>(contextual)) {}
};

// A block takes a chunk of the tokens of one sequence: small enough to occupy all multiprocessors, and at most one
// token per thread.
struct SlotPolicy {
  static constexpr int kThreads = 128, kTargets = 64;  // kTargets: targets per pass over the block's tokens
  static constexpr int kBlocksPerMultiprocessor = 2;
  int64_t chunk, chunks;  // chunk: tokens of a block; chunks: blocks of a sequence

  SlotPolicy(const MergeSizes& sizes, int64_t rows_per_block, int64_t multiprocessors) {
    const int64_t most = multiprocessors * kBlocksPerMultiprocessor;
    const int64_t wanted = (sizes.batch * sizes.tokens + most - 1) / most;
    chunk =
        std::clamp<int64_t>((wanted + rows_per_block - 1) / rows_per_block * rows_per_block, rows_per_block, kThreads);
    chunks = (sizes.tokens + chunk - 1) / chunk;
  }
};

// The rows of a short metric stay in registers, and its targets in shared memory. Longer rows are read from the caches.
template <int kVec>
using ShortMetric = RowPolicy<kVec, 8, 2, SlotPolicy::kBlocksPerMultiprocessor>;
template <int kVec>
using LongMetric = RowPolicy<kVec, 32, 2, SlotPolicy::kBlocksPerMultiprocessor, true>;

// The kept positions of a sequence.
struct KeptTokens {
  const int64_t* positions;  // (count,) ascending
  int count;

  // Returns how many kept tokens precede a position.
  __device__ __forceinline__ int before(int position) const {
    return count_first(count, [&](int rank) { return positions[rank] < position; });
  }

  // Returns the position of a token that is not kept, given its number among them. The result is within the sequence
  // whatever the positions are.
  __device__ __forceinline__ int position_of(int number) const {
    return number + count_first(count, [&](int rank) { return positions[rank] <= number + rank; });
  }
};

// The targets of one pass of a block. Lives in shared memory.
template <typename scalar_t, typename Policy>
struct Targets {
  using Vec = Vector<scalar_t, Policy::kVec>;
  using RowSum = GroupSum<Policy::kThreadsPerRow, 1>;
  static constexpr bool kStaged = !Policy::kUnbounded;
  static constexpr int kCount = SlotPolicy::kTargets;
  int positions[kCount];
  float inverse_lengths[kCount];
  alignas(kVectorBytes) scalar_t rows[kStaged ? kCount : 1][kStaged ? Policy::kColumns : 1];

  // Finds `count` targets, which are every `step`-th of the tokens that are not kept from number `first` on, and
  // computes their inverse lengths. Called by the whole block.
  __device__ __forceinline__ void find(const Input<scalar_t, 3>& metric, int64_t batch, KeptTokens kept, int first,
                                       int step, int count, int hidden, RowSum& row_sum) {
    __syncthreads();  // all threads are done with the previous targets
    if (static_cast<int>(threadIdx.x) < count) positions[threadIdx.x] = kept.position_of(first + threadIdx.x * step);
    __syncthreads();
    for (int base = 0; base < count; base += Policy::kRowsPerBlock) {
      const int target = base + Policy::group();
      const int end = target < count ? hidden : 0;
      const scalar_t* const row = end > 0 ? metric.at(batch, positions[target]) : nullptr;
      float squares[1] = {0.f};
      const auto take = [&](int column) {
        const Vec values = Vec::load(row + column);
        if constexpr (kStaged) values.store(&rows[target][column]);
#pragma unroll
        for (int i = 0; i < Policy::kVec; ++i) squares[0] += values[i] * values[i];
      };
      Policy::for_kept(end, [&](int, int column) { take(column); });
      Policy::for_rest(end, take);
      row_sum.add_up(squares, 0);
      if (target < count && Policy::first() == 0) {
        inverse_lengths[target] = squares[0] > 0.f ? rsqrtf(squares[0]) : 0.f;
      }
    }
    __syncthreads();
  }

  // Finds the nearest of `count` targets, numbered from `first` on, to the row of the thread's group; ties go to the
  // lower number. Similarities are not divided by the row's own length, which does not change their order.
  __device__ __forceinline__ void nearest(const Input<scalar_t, 3>& metric, int64_t batch, const scalar_t* row, int end,
                                          int first, int count, RowSum& row_sum, float& best, int& best_target) const {
    Vec kept[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) { kept[k] = Vec::load(row + column); });
#pragma unroll 2
    for (int target = 0; target < count; ++target) {
      const scalar_t* target_row;
      if constexpr (kStaged) {
        target_row = rows[target];
      } else {
        target_row = metric.at(batch, positions[target]);
      }
      float dot[1] = {0.f};
      const auto add = [&](const Vec& own, int column) {
        const Vec other = Vec::load(target_row + column);
#pragma unroll
        for (int i = 0; i < Policy::kVec; ++i) dot[0] += own[i] * other[i];
      };
      Policy::for_all(end, kept, [&](int column) { return Vec::load(row + column); }, add);
      row_sum.add_up(dot, 0);
      const float similarity = dot[0] * inverse_lengths[target];
      // A non-finite row has no cosine, so its token goes to the first target.
      if (similarity > best && similarity < INFINITY) best = similarity, best_target = first + target;
    }
  }
};

template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads)
    merge_slots_kernel(Input<scalar_t, 3> metric,    // (batch, tokens, hidden)
                       Input<int64_t, 2> kept,       // (batch, kept_count)
                       int32_t* __restrict__ slots,  // (batch, tokens)
                       MergeSizes sizes, SlotPolicy policy) {
  constexpr int kTargets = SlotPolicy::kTargets;
  static_assert(Policy::kThreadsPerRow <= kWarp && Policy::kThreads == SlotPolicy::kThreads, "rows are warps' own");
  __shared__ Targets<scalar_t, Policy> targets;
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> row_sum;
  __shared__ bool joins[SlotPolicy::kThreads];
  __shared__ float best_similarities[SlotPolicy::kThreads];
  __shared__ int best_targets[SlotPolicy::kThreads];
  const int thread = threadIdx.x, hidden = static_cast<int>(sizes.hidden);
  const int contextual = sizes.contextual, kept_count = sizes.kept_count;
  const int step = contextual > 0 ? (sizes.tokens - kept_count) / contextual : 1;

  for (int64_t work = blockIdx.x; work < sizes.batch * policy.chunks; work += gridDim.x) {
    const int64_t batch = work / policy.chunks;
    const int first = static_cast<int>(work % policy.chunks * policy.chunk);
    const int count = min(static_cast<int>(policy.chunk), sizes.tokens - first);
    const KeptTokens kept_tokens{kept.at(batch), kept_count};
    int32_t* const own_slots = slots + batch * sizes.tokens;
    __syncthreads();  // all threads are done with the previous tokens
    if (thread < count) {
      const int position = first + thread, rank = kept_tokens.before(position), number = position - rank;
      const bool is_kept = rank < kept_count && kept_tokens.positions[rank] == position;
      const bool is_target = contextual > 0 && number % step == 0 && number / step < contextual;
      joins[thread] = !is_kept && contextual > 0 && !is_target;
      if (!joins[thread]) {
        own_slots[position] = is_kept ? rank - kept_count : is_target ? number / step : -kept_count - 1;
      }
    }

    for (int first_target = 0; first_target < contextual; first_target += kTargets) {
      const int target_count = min(kTargets, contextual - first_target);
      targets.find(metric, batch, kept_tokens, first_target * step, step, target_count, hidden, row_sum);
      for (int base = 0; base < count; base += Policy::kRowsPerBlock) {
        const int token = base + Policy::group();
        const bool joining = token < count && joins[token];
        if (!__any_sync(kAllLanes, joining)) continue;
        const int end = joining ? hidden : 0;  // other tokens of the warp only take part in the shuffles
        float best = -INFINITY;
        int best_target = 0;
        targets.nearest(metric, batch, metric.at(batch, first + token), end, first_target, target_count, row_sum, best,
                        best_target);
        if (!joining || Policy::first() != 0) continue;
        if (first_target > 0 && !(best > best_similarities[token])) best_target = best_targets[token];
        if (first_target + kTargets < contextual) {
          best_similarities[token] = first_target > 0 ? max(best, best_similarities[token]) : best;
          best_targets[token] = best_target;
        } else {
          own_slots[first + token] = contextual + best_target;
        }
      }
    }
  }
}

}  // namespace vlmfast
