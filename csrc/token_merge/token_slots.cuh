// Decides where each token goes, in one launch: kept, the target of a contextual token, or merged into the one whose
// target is nearest. Blocks share nothing: a token finds its number, and a target its place, by a search among the
// kept positions, which ascend.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "common/row_policy.cuh"
#include "common/token_choice.cuh"

namespace vlmfast {

// Tokens of one crop for a block, so many that all multiprocessors have some, and few enough for a thread each.
struct SlotPolicy {
  static constexpr int kThreads = 128, kTargets = 64;  // targets that are looked at before the tokens are read again
  static constexpr int kBlocksPerMultiprocessor = 2;
  int64_t chunk, per_crop;

  SlotPolicy(int64_t crops, int64_t tokens, int64_t rows_per_block, int64_t multiprocessors) {
    const int64_t most = multiprocessors * kBlocksPerMultiprocessor;
    const int64_t wanted = (crops * tokens + most - 1) / most;
    chunk =
        std::clamp<int64_t>((wanted + rows_per_block - 1) / rows_per_block * rows_per_block, rows_per_block, kThreads);
    per_crop = (tokens + chunk - 1) / chunk;
  }
};

// Which tokens of a crop are kept.
struct KeptTokens {
  const int64_t* kept;  // (count,) ascending
  int count;

  // How many of the kept ones satisfy(position, rank), which the first ones do.
  template <typename Satisfy>
  __device__ __forceinline__ int search(Satisfy satisfy) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (satisfy(kept[middle], middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // How many are kept before a position.
  __device__ __forceinline__ int before(int position) const {
    return search([&](int64_t kept_position, int) { return kept_position < position; });
  }

  // The position of a token that is not kept, by its number among those: within the crop, whatever `kept` holds.
  __device__ __forceinline__ int position_of(int number) const {
    return number + search([&](int64_t position, int rank) { return position <= number + rank; });
  }
};

// Kept rows of registers for short metrics, whose targets wait in shared memory; longer ones come from the caches.
template <int kVec>
using ShortMetric = RowPolicy<kVec, 8, 2, SlotPolicy::kBlocksPerMultiprocessor>;
template <int kVec>
using LongMetric = RowPolicy<kVec, 32, 2, SlotPolicy::kBlocksPerMultiprocessor, true>;

// The targets that a block looks at.
template <typename scalar_t, typename Policy>
struct Targets {
  static constexpr bool kStaged = !Policy::kUnbounded;
  static constexpr int kCount = SlotPolicy::kTargets;
  int positions[kCount];
  float inverse_lengths[kCount];
  alignas(kVectorBytes) scalar_t rows[kStaged ? kCount : 1][kStaged ? Policy::kColumns : 1];
};

template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads)
    merge_slots_kernel(ImagePointer<scalar_t> metric,  // (crops, tokens, size)
                       RowPointer<int64_t> kept,       // (crops, chosen)
                       int32_t* __restrict__ slots,    // (crops, tokens)
                       int64_t crops, int tokens, int chosen, int contextual, int size, SlotPolicy policy) {
  constexpr int kVec = Policy::kVec, kTargets = SlotPolicy::kTargets;
  using Vec = Vector<scalar_t, kVec>;
  static_assert(Policy::kThreadsPerRow <= kWarp && Policy::kThreads == SlotPolicy::kThreads, "rows are warps' own");
  __shared__ Targets<scalar_t, Policy> targets;
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> group_sum;
  __shared__ bool joins[SlotPolicy::kThreads];
  __shared__ float best_similarities[SlotPolicy::kThreads];
  __shared__ int best_targets[SlotPolicy::kThreads];
  const int thread = threadIdx.x;
  const int step = contextual > 0 ? (tokens - chosen) / contextual : 1;

  for (int64_t work = blockIdx.x; work < crops * policy.per_crop; work += gridDim.x) {
    const int64_t crop = work / policy.per_crop;
    const int first = static_cast<int>(work % policy.per_crop * policy.chunk);
    const int count = min(static_cast<int>(policy.chunk), tokens - first);
    const KeptTokens others{kept[crop], chosen};
    int32_t* const crop_slots = slots + crop * tokens;
    __syncthreads();  // the tokens before these are done
    if (thread < count) {
      const int position = first + thread, rank = others.before(position), number = position - rank;
      const bool is_kept = rank < chosen && others.kept[rank] == position;
      const bool is_target = contextual > 0 && number % step == 0 && number / step < contextual;
      joins[thread] = !is_kept && contextual > 0 && !is_target;
      if (!joins[thread]) crop_slots[position] = is_kept ? rank - chosen : is_target ? number / step : -chosen - 1;
    }

    for (int first_target = 0; first_target < contextual; first_target += kTargets) {
      const int target_count = min(kTargets, contextual - first_target);
      __syncthreads();
      if (thread < target_count) targets.positions[thread] = others.position_of((first_target + thread) * step);
      __syncthreads();
      for (int base = 0; base < target_count; base += Policy::kRowsPerBlock) {
        const int target = base + Policy::group();
        const int end = target < target_count ? size : 0;
        const scalar_t* const row = end > 0 ? metric.at(crop, targets.positions[target]) : nullptr;
        float squares[1] = {0.f};
        const auto take = [&](int column) {
          const Vec values = Vec::load(row + column);
          if constexpr (Targets<scalar_t, Policy>::kStaged) values.store(&targets.rows[target][column]);
#pragma unroll
          for (int i = 0; i < kVec; ++i) squares[0] += values[i] * values[i];
        };
        Policy::for_kept(end, [&](int, int column) { take(column); });
        Policy::for_rest(end, take);
        group_sum.add_up(squares, 0);
        if (target < target_count && Policy::first() == 0) {
          targets.inverse_lengths[target] = squares[0] > 0.f ? rsqrtf(squares[0]) : 0.f;
        }
      }
      __syncthreads();

      for (int base = 0; base < count; base += Policy::kRowsPerBlock) {
        const int token = base + Policy::group();
        const bool joining = token < count && joins[token];
        if (!__any_sync(kAllLanes, joining)) continue;
        const int end = joining ? size : 0;  // the other tokens of a warp only take part in the shuffles
        const scalar_t* const row = metric.at(crop, first + token);
        Vec values[Policy::kVectors];
        Policy::for_kept(end, [&](int k, int column) { values[k] = Vec::load(row + column); });
        // The length of the token's own metric changes nothing: its cosines are in the order of these.
        float best = -INFINITY;
        int best_target = 0;
#pragma unroll 2
        for (int target = 0; target < target_count; ++target) {
          const scalar_t* target_row;
          if constexpr (Targets<scalar_t, Policy>::kStaged) {
            target_row = targets.rows[target];
          } else {
            target_row = metric.at(crop, targets.positions[target]);
          }
          float product[1] = {0.f};
          const auto add = [&](const Vec& own, int column) {
            const Vec other = Vec::load(target_row + column);
#pragma unroll
            for (int i = 0; i < kVec; ++i) product[0] += own[i] * other[i];
          };
          Policy::for_kept(end, [&](int k, int column) { add(values[k], column); });
          Policy::for_rest(end, [&](int column) { add(Vec::load(row + column), column); });
          group_sum.add_up(product, 0);
          const float similarity = product[0] * targets.inverse_lengths[target];
          if (similarity > best) best = similarity, best_target = first_target + target;  // of equal ones the first
        }
        if (!joining || Policy::first() != 0) continue;
        if (first_target > 0 && !(best > best_similarities[token])) best_target = best_targets[token];
        if (first_target + kTargets < contextual) {
          best_similarities[token] = first_target > 0 ? max(best, best_similarities[token]) : best;
          best_targets[token] = best_target;
        } else {
          crop_slots[first + token] = contextual + best_target;
        }
      }
    }
  }
}

template <typename scalar_t>
void launch_merge_slots(const DeviceScope& scope, const ImagePointer<scalar_t>& metric, RowPointer<int64_t> kept,
                        int64_t crops, int64_t tokens, int64_t chosen, int64_t contextual, int64_t size,
                        int32_t* slots) {
  const auto with_policy = [&](auto policy) {
    using Policy = decltype(policy);
    const SlotPolicy chunks(crops, tokens, Policy::kRowsPerBlock, scope.multiprocessors());
    check_cuda(launch(merge_slots_kernel<scalar_t, Policy>, dim3(std::min(crops * chunks.per_crop, kMaxBlocks)),
                      dim3(Policy::kThreads), 0, scope.stream(), metric, kept, slots, crops, tokens, chosen, contextual,
                      size, chunks));
  };
  const auto in_vectors = [&](auto vec) {
    constexpr int kVec = decltype(vec)::value;
    if (size <= ShortMetric<kVec>::kColumns) return with_policy(ShortMetric<kVec>());
    with_policy(LongMetric<kVec>());
  };
  constexpr int kVec = kVectorBytes / sizeof(scalar_t);
  if (vectors_fit(kVectorBytes, size, {metric.rows(), metric.images()}))
    return in_vectors(std::integral_constant<int, kVec>());
  in_vectors(std::integral_constant<int, 1>());
}

}  // namespace vlmfast
