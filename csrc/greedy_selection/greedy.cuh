// What the greedy choices share: one block for an image, whose threads each look after some of its tokens.
#pragma once

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "greedy_selection/ops.h"

namespace vlmfast {

struct GreedyPolicy {
  static constexpr int kThreads = 512, kWarps = kThreads / kWarp;
  int64_t batch;
  int tokens, k;

  GreedyPolicy(int64_t batch, int64_t tokens, int64_t k)
      : batch(batch), tokens(static_cast<int>(tokens)), k(static_cast<int>(k)) {}
};

constexpr float kTaken = -1.f;  // less than anything is worth

// Calls function(token) for those of the thread.
template <typename Function>
__device__ __forceinline__ void for_own(int tokens, Function function) {
  for (int token = threadIdx.x; token < tokens; token += GreedyPolicy::kThreads) function(token);
}

// The best token that a thread has seen: the first of those that are worth most. What is worth 0 has a key of 1.
struct Best {
  unsigned key = 0, token = ~0u;

  __device__ __forceinline__ void offer(float worth, int candidate) {
    unsigned bits;
    worth += 0.f;  // -0 + 0 is 0
    memcpy(&bits, &worth, sizeof bits);
    if (bits + 1 > key) {
      key = bits + 1;
      token = candidate;
    }
  }

  // Takes the best of a warp.
  __device__ __forceinline__ void take_best_of_warp() {
    const unsigned most = __reduce_max_sync(kAllLanes, key);
    token = __reduce_min_sync(kAllLanes, key == most ? token : ~0u);
    key = most;
  }
};

// Finds the best of a block. Lives in shared memory.
struct BlockBest {
  unsigned keys[2][GreedyPolicy::kWarps], tokens[2][GreedyPolicy::kWarps];

  // `turn` counts the calls: two buffers in turn spare a barrier, as in GroupSum.
  __device__ __forceinline__ int find(Best best, int turn) {
    unsigned (&key_of)[GreedyPolicy::kWarps] = keys[turn % 2];
    unsigned (&token_of)[GreedyPolicy::kWarps] = tokens[turn % 2];
    const int lane = threadIdx.x % kWarp;
    best.take_best_of_warp();
    if (lane == 0) {
      key_of[threadIdx.x / kWarp] = best.key;
      token_of[threadIdx.x / kWarp] = best.token;
    }
    __syncthreads();
    best = Best{};
    if (lane < GreedyPolicy::kWarps) best = {key_of[lane], token_of[lane]};
    best.take_best_of_warp();
    return static_cast<int>(best.token);
  }
};

// Reads what each token is worth, 1 where nothing says it, into `to`; returns whether a choice can be made by it.
template <typename quality_t>
__device__ __forceinline__ bool read_weights(const quality_t* from, int tokens, float* to) {
  bool sound = true;
  for_own(tokens, [&](int token) {
    const float weight = from != nullptr ? to_float(from[token]) : 1.f;
    sound = sound && weight >= 0.f && weight < INFINITY;
    to[token] = weight;
  });
  return sound;
}

// Writes the positions of the tokens that is_taken(token) names, ascending. All threads of the block call it.
template <typename Taken>
__device__ __forceinline__ void write_taken(int tokens, Taken is_taken, BlockCount<GreedyPolicy::kThreads>& counts,
                                            int64_t* chosen, int& turn) {
  int before = 0;
  for (int first = 0; first < tokens; first += GreedyPolicy::kThreads) {
    const int token = first + threadIdx.x;
    const bool taken = token < tokens && is_taken(token);
    const unsigned lanes = __ballot_sync(kAllLanes, taken);
    const auto sums = counts.add_up(__popc(lanes), turn++);
    if (taken) chosen[before + sums.earlier_warps + __popc(lanes & earlier_lanes())] = token;
    before += sums.block;
  }
}

}  // namespace vlmfast
