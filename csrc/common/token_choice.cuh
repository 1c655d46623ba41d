// Finds the largest scores of each row, in the order of their positions: a radix select by one block per row, in one
// launch. No sort: eight bits of the order-preserving integers at a time, each step counts what is still undecided.
#pragma once

#include <algorithm>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "common/row_ranks.cuh"

namespace vlmfast {

constexpr unsigned kAllLanes = 0xffffffffu;

// A thread for each value of a digit, which also takes every kThreads-th position.
struct ChoicePolicy {
  static constexpr int kThreads = 256, kDigitBits = 8;
  static constexpr int64_t kCachedBytes = 40 * 1024;  // keys that stay in shared memory; the rest are made again
  int cached;

  ChoicePolicy(int64_t tokens, int64_t key_bytes)
      : cached(static_cast<int>(std::min(tokens, kCachedBytes / key_bytes))) {}
};

// Adds one to counters[index], in shared memory, for each lane of the warp that counts. All lanes of the warp call it,
// and those with one index send one atomic: scores have few first digits, slots few numbers.
__device__ __forceinline__ void count_one(int* counters, unsigned index, bool counts) {
  const unsigned lanes = __ballot_sync(kAllLanes, counts);
  if (!counts) return;
  const unsigned peers = __match_any_sync(lanes, index);
  if (static_cast<int>(threadIdx.x % kWarp) == __ffs(static_cast<int>(peers)) - 1) {
    atomicAdd(&counters[index], __popc(peers));
  }
}

// Integers in the order of the scores, with one for both zeros.
template <typename scalar_t>
struct ScoreKey {
  using Bits = std::conditional_t<sizeof(scalar_t) == 2, uint16_t, uint32_t>;
  static constexpr int kBits = 8 * sizeof(scalar_t);

  __device__ __forceinline__ static Bits of(scalar_t score) {
    Bits bits;
    memcpy(&bits, &score, sizeof bits);
    constexpr Bits kSign = Bits{1} << (kBits - 1);
    if (bits == kSign) bits = 0;
    return static_cast<Bits>((bits & kSign) != 0 ? ~bits : bits | kSign);
  }
};

template <typename scalar_t>
__global__ void __launch_bounds__(ChoicePolicy::kThreads, 1)
    top_tokens_kernel(RowPointer<scalar_t> scores,   // (rows, tokens)
                      int64_t* __restrict__ chosen,  // (rows, k)
                      int64_t rows, int tokens, int k, ChoicePolicy policy) {
  using Key = ScoreKey<scalar_t>;
  using Bits = typename Key::Bits;
  constexpr int kThreads = ChoicePolicy::kThreads, kDigits = 1 << ChoicePolicy::kDigitBits;
  static_assert(kThreads == kDigits, "a thread for each value of a digit");
  __shared__ int histogram[kDigits];
  __shared__ BlockCount<kThreads> block_count;
  __shared__ struct {
    unsigned digit;
    int wanted;
  } decided;
  VLMFAST_DYNAMIC_SHARED(Bits, cache);  // (policy.cached,), each key touched by one thread alone
  const int lane = threadIdx.x % kWarp;
  int turn = 0;
  histogram[threadIdx.x] = 0;

  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const scalar_t* const row_scores = scores[row];
    bool numbers = true;
#pragma unroll 4
    for (int position = threadIdx.x; position < tokens; position += kThreads) {
      const scalar_t score = row_scores[position];
      numbers = numbers && to_float(score) == to_float(score);
      if (position < policy.cached) cache[position] = Key::of(score);
    }
    VLMFAST_DEVICE_ASSERT(numbers, "scores must not be NaN");
    if (k == 0) continue;
    __syncthreads();  // the histogram is clear
    const auto key_at = [&](int position) -> unsigned {
      return position < policy.cached ? cache[position] : Key::of(row_scores[position]);
    };

    // The k-th largest key, digit by digit; `wanted`: how many of those with the digits so far are chosen.
    unsigned threshold = 0, decided_bits = 0;
    int wanted = k;
#pragma unroll 1
    for (int shift = Key::kBits - ChoicePolicy::kDigitBits; shift >= 0; shift -= ChoicePolicy::kDigitBits) {
      for (int first = 0; first < tokens; first += kThreads) {
        const int position = first + threadIdx.x;
        const unsigned key = position < tokens ? key_at(position) : 0;
        const bool undecided = position < tokens && ((key ^ threshold) & decided_bits) == 0;
        count_one(histogram, key >> shift & (kDigits - 1), undecided);
      }
      __syncthreads();
      const unsigned digit = kDigits - 1 - threadIdx.x;
      const int count = histogram[digit];
      histogram[digit] = 0;
      int through = count;  // of this digit and the larger ones
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int larger = __shfl_up_sync(kAllLanes, through, offset);
        if (lane >= offset) through += larger;
      }
      through += block_count.add_up(__shfl_sync(kAllLanes, through, kWarp - 1), turn++).earlier_warps;
      if (through - count < wanted && wanted <= through) decided = {digit, wanted - (through - count)};
      __syncthreads();
      threshold |= decided.digit << shift;
      decided_bits |= static_cast<unsigned>(kDigits - 1) << shift;
      wanted = decided.wanted;
    }

    // Those above the threshold, and the first of those at it, find their places by counting.
    constexpr int kHalf = 16;  // two counts in one number: at most kThreads each
    int above_before = 0, equal_before = 0;
    for (int first = 0; first < tokens; first += kThreads) {
      const int position = first + threadIdx.x;
      const unsigned key = position < tokens ? key_at(position) : 0;
      const bool above = position < tokens && key > threshold, equal = position < tokens && key == threshold;
      const unsigned above_lanes = __ballot_sync(kAllLanes, above), equal_lanes = __ballot_sync(kAllLanes, equal);
      const unsigned earlier_lanes = (1u << lane) - 1;
      const auto sums = block_count.add_up(__popc(above_lanes) | __popc(equal_lanes) << kHalf, turn++);
      const int above_rank =
          above_before + (sums.earlier_warps & ((1 << kHalf) - 1)) + __popc(above_lanes & earlier_lanes);
      const int equal_rank = equal_before + (sums.earlier_warps >> kHalf) + __popc(equal_lanes & earlier_lanes);
      if (above || (equal && equal_rank < wanted)) chosen[row * k + above_rank + min(equal_rank, wanted)] = position;
      above_before += sums.block & ((1 << kHalf) - 1);
      equal_before += sums.block >> kHalf;
    }
  }
}

template <typename scalar_t>
void launch_top_tokens(const DeviceScope& scope, RowPointer<scalar_t> scores, int64_t rows, int64_t tokens, int64_t k,
                       int64_t* chosen) {
  const ChoicePolicy policy(tokens, sizeof(scalar_t));
  check_cuda(launch(top_tokens_kernel<scalar_t>, dim3(std::min(rows, kMaxBlocks)), dim3(ChoicePolicy::kThreads),
                    policy.cached * sizeof(scalar_t), scope.stream(), scores, chosen, rows, tokens, k, policy));
}

}  // namespace vlmfast
