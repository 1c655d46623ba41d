// Numbers the masked positions of each sample, in one launch that is the same in every run: no atomics, and no block
// waits for another. A block counts all of the mask before its own part, which costs loads from the L2 cache alone.
#pragma once

#include <algorithm>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

constexpr int kRankThreads = 256;

// How the positions of a sample are shared out: a block has a chunk of them, and takes kRankThreads at a time.
struct ChunkPolicy {
  static constexpr int64_t kMostChunks = 128;  // of a sample: each costs a count of the mask before it
  int64_t positions, per_sample;

  explicit ChunkPolicy(int64_t tokens) {
    const int64_t steps = (tokens + kRankThreads - 1) / kRankThreads;
    const int64_t most = std::min(kMostChunks, kMaxBlocks);
    positions = (steps + most - 1) / most * kRankThreads;
    per_sample = (tokens + positions - 1) / positions;
  }
};

// Adds up what the warps of a block have counted. Lives in shared memory.
template <int kThreads>
struct BlockCount {
  static constexpr int kWarps = kThreads / kWarp;
  struct Sums {
    int earlier_warps, block;
  };
  int warp_counts[2][kWarps];

  // `turn` counts the calls: two buffers in turn spare a barrier, as in GroupSum.
  __device__ __forceinline__ Sums add_up(int warp_count, int turn) {
    int (&buffer)[kWarps] = warp_counts[turn % 2];
    const int own_warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) buffer[own_warp] = warp_count;
    __syncthreads();
    Sums sums{0, 0};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < own_warp) sums.earlier_warps += buffer[warp];
      sums.block += buffer[warp];
    }
    return sums;
  }
};

__device__ __forceinline__ int nonzero_bytes(unsigned word) {
  constexpr unsigned kLowBits = 0x7f7f7f7f;
  return __popc((((word & kLowBits) + kLowBits) | word) & ~kLowBits);
}

// This thread's part of the number of masked positions from begin to end.
__device__ __forceinline__ int count_masked(const uint8_t* __restrict__ begin, const uint8_t* __restrict__ end) {
  constexpr int kBytes = 16;
  const int64_t before_vectors = (kBytes - reinterpret_cast<uintptr_t>(begin) % kBytes) % kBytes;
  const uint8_t* const vectors = begin + min(before_vectors, static_cast<int64_t>(end - begin));
  const uint8_t* const rest = vectors + (end - vectors) / kBytes * kBytes;
  int count = 0;
  if (threadIdx.x < vectors - begin) count += begin[threadIdx.x] != 0;
  if (threadIdx.x < end - rest) count += rest[threadIdx.x] != 0;
#pragma unroll 4
  for (const uint8_t* p = vectors + threadIdx.x * kBytes; p < rest; p += kRankThreads * kBytes) {
    const auto words = Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(p));
#pragma unroll
    for (int i = 0; i < 4; ++i) count += nonzero_bytes(words.values[i]);
  }
  return count;
}

// Calls visit(sample, position, masked, rank, total) for every position of the mask: `rank` counts the masked positions
// before it in its sample, `total`, where the visit needs it, all of them.
template <typename Visit>
__global__ void __launch_bounds__(kRankThreads)
    rank_kernel(const uint8_t* __restrict__ mask,  // (samples, tokens)
                int64_t samples, int64_t tokens, ChunkPolicy chunks, Visit visit) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  __shared__ BlockCount<kRankThreads> block_count;
  int turn = 0;
  for (int64_t chunk = blockIdx.x; chunk < samples * chunks.per_sample; chunk += gridDim.x) {
    const int64_t sample = chunk / chunks.per_sample;
    const int64_t begin = chunk % chunks.per_sample * chunks.positions, end = min(begin + chunks.positions, tokens);
    const uint8_t* const masked_at = mask + sample * tokens;
    const auto count = [&](int64_t from, int64_t to) {
      const int own = count_masked(masked_at + from, masked_at + to);
      return block_count.add_up(__reduce_add_sync(kAllLanes, own), turn++).block;
    };
    int before = count(0, begin);
    const int total = Visit::kNeedsTotal ? before + count(begin, tokens) : 0;
    for (int64_t first = begin; first < end; first += kRankThreads) {
      const int64_t position = first + threadIdx.x;
      const bool masked = position < end && masked_at[position] != 0;
      const unsigned lanes = __ballot_sync(kAllLanes, masked), earlier_lanes = (1u << threadIdx.x % kWarp) - 1;
      const auto sums = block_count.add_up(__popc(lanes), turn++);
      if (position < end) {
        visit(sample, position, masked, before + sums.earlier_warps + __popc(lanes & earlier_lanes), total);
      }
      before += sums.block;
    }
  }
}

template <typename Visit>
void launch_rank(const DeviceScope& scope, const uint8_t* mask, int64_t samples, int64_t tokens, const Visit& visit) {
  const ChunkPolicy chunks(tokens);
  check_cuda(launch(rank_kernel<Visit>, dim3(std::min(samples * chunks.per_sample, kMaxBlocks)), dim3(kRankThreads), 0,
                    scope.stream(), mask, samples, tokens, chunks, visit));
}

}  // namespace vlmfast
