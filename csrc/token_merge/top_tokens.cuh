// Finds the largest scores of each row and writes their positions in ascending order: a radix select with one block per
// row, in one launch. Scores are mapped to integers in the same order; each step counts the next eight bits of the
// scores that are still undecided.
#pragma once

#include <algorithm>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// Each thread owns one value of a digit, and every kThreads-th position.
struct TopPolicy {
  static constexpr int kThreads = 256, kDigitBits = 8, kDigits = 1 << kDigitBits;
  static constexpr int64_t kCachedBytes = 40 * 1024;  // of keys in shared memory; further keys are recomputed
  static_assert(kThreads == kDigits, "a thread for each value of a digit");
  int64_t batch;
  int tokens, kept_count, cached;

  TopPolicy(int64_t batch, int64_t tokens, int64_t kept_count, int64_t key_bytes)
      : batch(batch),
        tokens(static_cast<int>(tokens)),
        kept_count(static_cast<int>(kept_count)),
        cached(static_cast<int>(std::min(tokens, kCachedBytes / key_bytes))) {}
};

// Adds one to counters[index] in shared memory for each lane of the warp with `counts`. All lanes must call it. Lanes
// with the same index share one atomic, because leading digits of scores and numbers of slots take few values.
__device__ __forceinline__ void count_one(int* counters, unsigned index, bool counts) {
  const unsigned lanes = __ballot_sync(kAllLanes, counts);
  if (!counts) return;
  const unsigned peers = __match_any_sync(lanes, index);
  if (static_cast<int>(threadIdx.x % kWarp) == __ffs(static_cast<int>(peers)) - 1) {
    atomicAdd(&counters[index], __popc(peers));
  }
}

// Maps scores to unsigned integers in the same order, with equal keys for 0 and -0.
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

// The smallest kept key, and how many of the tokens with this key are kept.
struct Threshold {
  unsigned key;
  int wanted;
};

// The counts of a block. Lives in shared memory.
struct TopShared {
  int histogram[TopPolicy::kDigits];  // all zeros between steps
  BlockCount<TopPolicy::kThreads> block_count;
  struct {
    unsigned digit;
    int wanted;
  } decided;

  // Finds the kept_count-th largest key among key_at(position), digit by digit.
  template <int kBits, typename KeyAt>
  __device__ __forceinline__ Threshold find_threshold(KeyAt key_at, int tokens, int kept_count, int& turn) {
    constexpr int kThreads = TopPolicy::kThreads, kDigits = TopPolicy::kDigits, kDigitBits = TopPolicy::kDigitBits;
    const int lane = threadIdx.x % kWarp;
    unsigned threshold = 0, decided_bits = 0;
    int wanted = kept_count;  // how many tokens to keep of those with the digits decided so far
#pragma unroll 1
    for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
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
      int through = count;  // becomes the count of this digit and all larger ones
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
    return {threshold, wanted};
  }

  // Writes the positions of all keys above the threshold and of the first ones at the threshold. Prefix counts give the
  // index of each in the output.
  template <typename KeyAt>
  __device__ __forceinline__ void write_kept(KeyAt key_at, int tokens, Threshold threshold, int64_t* kept, int& turn) {
    constexpr int kHalf = 16;  // packs two counts, of at most kThreads each, into one integer
    int above_before = 0, equal_before = 0;
    for (int first = 0; first < tokens; first += TopPolicy::kThreads) {
      const int position = first + threadIdx.x;
      const unsigned key = position < tokens ? key_at(position) : 0;
      const bool above = position < tokens && key > threshold.key, equal = position < tokens && key == threshold.key;
      const unsigned above_lanes = __ballot_sync(kAllLanes, above), equal_lanes = __ballot_sync(kAllLanes, equal);
      const auto sums = block_count.add_up(__popc(above_lanes) | __popc(equal_lanes) << kHalf, turn++);
      const int above_rank =
          above_before + (sums.earlier_warps & ((1 << kHalf) - 1)) + __popc(above_lanes & earlier_lanes());
      const int equal_rank = equal_before + (sums.earlier_warps >> kHalf) + __popc(equal_lanes & earlier_lanes());
      if (above || (equal && equal_rank < threshold.wanted)) {
        kept[above_rank + min(equal_rank, threshold.wanted)] = position;
      }
      above_before += sums.block & ((1 << kHalf) - 1);
      equal_before += sums.block >> kHalf;
    }
  }
};

template <typename scalar_t>
__global__ void __launch_bounds__(TopPolicy::kThreads)
    top_tokens_kernel(Input<scalar_t, 2> scores,   // (batch, tokens)
                      int64_t* __restrict__ kept,  // (batch, kept_count)
                      TopPolicy policy) {
  using Key = ScoreKey<scalar_t>;
  using Bits = typename Key::Bits;
  __shared__ TopShared shared;
  VLMFAST_DYNAMIC_SHARED(Bits,
                         cache);  // (policy.cached,); each key is accessed by one thread, so no barrier
  int turn = 0;
  shared.histogram[threadIdx.x] = 0;

  for (int64_t batch = blockIdx.x; batch < policy.batch; batch += gridDim.x) {
    const scalar_t* const row = scores.at(batch);
    bool numbers = true;
#pragma unroll 4
    for (int position = threadIdx.x; position < policy.tokens; position += TopPolicy::kThreads) {
      const scalar_t score = row[position];
      numbers = numbers && to_float(score) == to_float(score);
      if (position < policy.cached) cache[position] = Key::of(score);
    }
    VLMFAST_DEVICE_ASSERT(numbers, "scores must not be NaN");
    if (policy.kept_count == 0) continue;
    __syncthreads();  // the histogram has been cleared
    const auto key_at = [&](int position) -> unsigned {
      return position < policy.cached ? cache[position] : Key::of(row[position]);
    };
    const Threshold threshold = shared.find_threshold<Key::kBits>(key_at, policy.tokens, policy.kept_count, turn);
    shared.write_kept(key_at, policy.tokens, threshold, kept + batch * policy.kept_count, turn);
  }
}

}  // namespace vlmfast
