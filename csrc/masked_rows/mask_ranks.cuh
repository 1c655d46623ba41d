// Ranks the masked positions of each sequence in one deterministic launch, without atomics or waits between blocks.
// Instead, each block counts the whole mask before its own chunk, which costs only loads from the L2 cache.
#pragma once

#include <algorithm>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// A block takes a chunk of the positions of one sequence, kThreads at a time.
struct RankPolicy {
  static constexpr int kThreads = 256;
  static constexpr int64_t kMostChunks = 128;  // per sequence, because each counts the whole mask before it
  int64_t batch, tokens, chunk, chunks;        // chunk: positions of a block; chunks: blocks of a sequence

  RankPolicy(int64_t batch, int64_t tokens) : batch(batch), tokens(tokens) {
    const int64_t steps = (tokens + kThreads - 1) / kThreads;
    const int64_t most = std::min(kMostChunks, kMaxBlocks);
    chunk = (steps + most - 1) / most * kThreads;
    chunks = (tokens + chunk - 1) / chunk;
  }
};

// Returns how many of the four bytes are not zero: the sum sets a byte's top bit if any of its lower bits is set.
__device__ __forceinline__ int nonzero_bytes(unsigned word) {
  constexpr unsigned kLowBits = 0x7f7f7f7f;
  return __popc((((word & kLowBits) + kLowBits) | word) & ~kLowBits);
}

// Returns the thread's share of the number of masked positions from `begin` to `end`.
__device__ __forceinline__ int count_masked(const uint8_t* __restrict__ begin, const uint8_t* __restrict__ end) {
  constexpr int kBytes = 16;
  const int64_t before_vectors = (kBytes - reinterpret_cast<uintptr_t>(begin) % kBytes) % kBytes;
  const uint8_t* const vectors = begin + min(before_vectors, static_cast<int64_t>(end - begin));
  const uint8_t* const rest = vectors + (end - vectors) / kBytes * kBytes;
  int count = 0;
  if (threadIdx.x < vectors - begin) count += begin[threadIdx.x] != 0;
  if (threadIdx.x < end - rest) count += rest[threadIdx.x] != 0;
#pragma unroll 4
  for (const uint8_t* p = vectors + threadIdx.x * kBytes; p < rest; p += RankPolicy::kThreads * kBytes) {
    const auto words = Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(p));
#pragma unroll
    for (int i = 0; i < 4; ++i) count += nonzero_bytes(words.values[i]);
  }
  return count;
}

// Calls visit(batch, position, masked, rank, total) for every position of the mask. `rank` is the number of masked
// positions before it in its sequence; `total` is that of the whole sequence, or 0 if the visitor does not need it.
template <typename Visit>
__global__ void __launch_bounds__(RankPolicy::kThreads)
    rank_kernel(const uint8_t* __restrict__ mask,  // (batch, tokens)
                RankPolicy policy, Visit visit) {
  __shared__ BlockCount<RankPolicy::kThreads> block_count;
  int turn = 0;
  for (int64_t work = blockIdx.x; work < policy.batch * policy.chunks; work += gridDim.x) {
    const int64_t batch = work / policy.chunks, begin = work % policy.chunks * policy.chunk;
    const int64_t end = min(begin + policy.chunk, policy.tokens);
    const uint8_t* const masked_at = mask + batch * policy.tokens;
    const auto count = [&](int64_t from, int64_t to) {
      const int own = count_masked(masked_at + from, masked_at + to);
      return block_count.add_up(__reduce_add_sync(kAllLanes, own), turn++).block;
    };
    int before = count(0, begin);
    const int total = Visit::kNeedsTotal ? before + count(begin, policy.tokens) : 0;
    for (int64_t first = begin; first < end; first += RankPolicy::kThreads) {
      const int64_t position = first + threadIdx.x;
      const bool masked = position < end && masked_at[position] != 0;
      const unsigned lanes = __ballot_sync(kAllLanes, masked);
      const auto sums = block_count.add_up(__popc(lanes), turn++);
      if (position < end) {
        visit(batch, position, masked, before + sums.earlier_warps + __popc(lanes & earlier_lanes()), total);
      }
      before += sums.block;
    }
  }
}

template <typename Visit>
void launch_rank(const DeviceScope& scope, const uint8_t* mask, int64_t batch, int64_t tokens, const Visit& visit) {
  const RankPolicy policy(batch, tokens);
  launch_blocks(scope, rank_kernel<Visit>, batch * policy.chunks, RankPolicy::kThreads, 0, mask, policy, visit);
}

}  // namespace vlmfast
