// Decides where each token goes, in one launch: kept, the target of a contextual token, or merged into the one whose
// target is nearest. Blocks share nothing: a token finds its number, and a target its place, by a search among the
// kept positions, which ascend.
#pragma once

#include <algorithm>

#include "common/row_policy.cuh"

namespace vlmfast {

struct MergeSizes {
  int64_t batch, hidden;               // hidden: elements of a row, be it of the metric
  int tokens, kept_count, contextual;  // of a sequence

  MergeSizes(int64_t batch, int64_t tokens, int64_t hidden, int64_t kept_count, int64_t contextual)
      : batch(batch),
        hidden(hidden),
        tokens(static_cast<int>(tokens)),
        kept_count(static_cast<int>(kept_count)),
        contextual(static_cast<int>(contextual)) {}
};

// Tokens of one sequence for a block, so many that all multiprocessors have some, and few enough for a thread each.
struct SlotPolicy {
  static constexpr int kThreads = 128, kTargets = 64;  // targets that are looked at before the tokens are read again
  static constexpr int kBlocksPerMultiprocessor = 2;
  int64_t chunk, chunks;  // chunk: tokens; chunks: of a sequence

  SlotPolicy(const MergeSizes& sizes, int64_t rows_per_block, int64_t multiprocessors) {
    const int64_t most = multiprocessors * kBlocksPerMultiprocessor;
    const int64_t wanted = (sizes.batch * sizes.tokens + most - 1) / most;
    chunk =
        std::clamp<int64_t>((wanted + rows_per_block - 1) / rows_per_block * rows_per_block, rows_per_block, kThreads);
    chunks = (sizes.tokens + chunk - 1) / chunk;
  }
};

// Rows of short metrics stay in registers, and their targets in shared memory; longer ones come from the caches.
template <int kVec>
using ShortMetric = RowPolicy<kVec, 8, 2, SlotPolicy::kBlocksPerMultiprocessor>;
template <int kVec>
using LongMetric = RowPolicy<kVec, 32, 2, SlotPolicy::kBlocksPerMultiprocessor, true>;

// The positions of a sequence that are kept.
struct KeptTokens {
  const int64_t* positions;  // (count,) ascending
  int count;

  // Returns how many are kept before a position.
  __device__ __forceinline__ int before(int position) const {
    return count_first(count, [&](int rank) { return positions[rank] < position; });
  }

  // Returns the position of a token that is not kept, by its number among those: within the sequence, whatever the
  // positions are.
  __device__ __forceinline__ int position_of(int number) const {
    return number + count_first(count, [&](int rank) { return positions[rank] <= number + rank; });
  }
};

// The targets that a block looks at. Lives in shared memory.
template <typename scalar_t, typename Policy>
struct Targets {
  using Vec = Vector<scalar_t, Policy::kVec>;
  using RowSum = GroupSum<Policy::kThreadsPerRow, 1>;
  static constexpr bool kStaged = !Policy::kUnbounded;
  static constexpr int kCount = SlotPolicy::kTargets;
  int positions[kCount];
  float inverse_lengths[kCount];
  alignas(kVectorBytes) scalar_t rows[kStaged ? kCount : 1][kStaged ? Policy::kColumns : 1];

  // Looks up `count` targets, `step` tokens apart from number `first` on, for the whole block.
  __device__ __forceinline__ void find(const Input<scalar_t, 3>& metric, int64_t batch, KeptTokens kept, int first,
                                       int step, int count, int hidden, RowSum& row_sum) {
    __syncthreads();  // those before these are done
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

  // Finds the number of the target, of `count` from `first` on, that is nearest to the row of the thread's group: the
  // first of equal ones. The row's own length changes nothing: its cosines are in the order of these similarities.
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
      // a row that is not finite has no cosine: its token goes to the first target
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
    __syncthreads();  // the tokens before these are done
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
        const int end = joining ? hidden : 0;  // the other tokens of a warp only take part in the shuffles
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
