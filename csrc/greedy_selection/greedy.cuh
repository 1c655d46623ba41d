// Shared by the greedy choices: one block per image, each thread of which owns some of the tokens.
#pragma once

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "greedy_selection/ops.h"

namespace vlmfast {

// Where an image is, and how many of its tokens are chosen.
struct Image {
  int64_t row;  // the row of tokens
  int first;    // the first token, in the row
  int tokens, k;
  int64_t token, place;  // the first token over all rows, and where the first one chosen goes
};

// The images that tokens are chosen from: each of `batch` rows of tokens is one, or one row has several.
struct Images {
  int64_t batch, count;
  int tokens, k;                        // of a row
  int longest;                          // the most tokens of an image
  const int32_t *cu_seqlens, *cu_kept;  // (count + 1,), or null: then each row is an image

  Images(const DeviceScope& scope, const ImageArguments& images, int64_t batch, int64_t tokens, int64_t k)
      : batch(batch),
        count(images.count),
        tokens(static_cast<int>(tokens)),
        k(static_cast<int>(k)),
        longest(static_cast<int>(images.longest)),
        cu_seqlens(images.cu_seqlens ? scope.input<int32_t>(images.cu_seqlens).data : nullptr),
        cu_kept(images.cu_seqlens ? scope.input<int32_t>(images.cu_kept).data : nullptr) {}

  __device__ __forceinline__ Image at(int64_t image) const {
    if (cu_seqlens == nullptr) return {image, 0, tokens, k, image * tokens, image * k};
    const int first = cu_seqlens[image], place = cu_kept[image];
    const int end = cu_seqlens[image + 1], end_place = cu_kept[image + 1];
    const bool is_first = image == 0, is_last = image + 1 == count;
    VLMFAST_DEVICE_ASSERT(first >= 0 && end >= first && end - first <= longest && (!is_first || first == 0) &&
                              (is_last ? end == tokens : end <= tokens),
                          "cu_seqlens must rise from 0 to the tokens, by at most longest");
    VLMFAST_DEVICE_ASSERT(place >= 0 && end_place >= place && end_place - place <= end - first &&
                              (!is_first || place == 0) && (is_last ? end_place == k : end_place <= k),
                          "cu_kept must rise from 0 to k, no faster than cu_seqlens");
    return {0, first, end - first, end_place - place, first, place};
  }
};

struct GreedyPolicy {
  static constexpr int kThreads = 512, kWarps = kThreads / kWarp;
};

constexpr float kTaken = -1.f;  // less than anything is worth

// Calls function(token) for the thread's tokens.
template <typename Function>
__device__ __forceinline__ void for_own(int tokens, Function function) {
  for (int token = threadIdx.x; token < tokens; token += GreedyPolicy::kThreads) function(token);
}

// The best token that a thread has been offered: the first of those that are worth most. Keys are in the order of
// worth, and 1 for a worth of 0. The highest bit, which is not set in numbers from 0 on, puts a token ahead of others.
struct Best {
  unsigned key = 0, token = ~0u;

  __device__ __forceinline__ void offer(float worth, int candidate, bool ahead = false) {
    unsigned bits;
    worth += 0.f;  // -0 + 0 is 0
    memcpy(&bits, &worth, sizeof bits);
    bits = ahead ? bits | 1u << 31 : bits;
    if (bits + 1 > key) {
      key = bits + 1;
      token = candidate;
    }
  }

  // Becomes the best of a warp.
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

// The weights of tokens or rows, of any dtype; without data all are 1.
struct Weights {
  const void* data = nullptr;
  int64_t stride = 0;  // in elements
  Dtype dtype = Dtype::kFloat32;

  __device__ __forceinline__ float at(int64_t row, int64_t i) const {
    if (data == nullptr) return 1.f;
    const int64_t element = row * stride + i;
    if (dtype == Dtype::kFloat16) return to_float(static_cast<const __half*>(data)[element]);
    if (dtype == Dtype::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[element]);
    return static_cast<const float*>(data)[element];
  }
};

inline Weights as_weights(const DeviceScope& scope, const View<2>& view) {
  Weights weights;
  if (!view) return weights;
  with_dtype(view.dtype(), [&](auto zero) {
    const auto input = scope.input<decltype(zero)>(view);
    weights = {input.data, input.strides[0], view.dtype()};
  });
  return weights;
}

// Copies `count` weights of a row to `to`; returns whether those that the thread copied are finite and not negative.
__device__ __forceinline__ bool read_weights(const Weights& weights, int64_t row, int first, int count, float* to) {
  bool sound = true;
  for_own(count, [&](int i) {
    const float weight = weights.at(row, int64_t{first} + i);
    sound = sound && weight >= 0.f && weight < INFINITY;
    to[i] = weight;
  });
  return sound;
}

// Writes the positions of an image's tokens that is_taken(token) names, ascending. All threads of the block call it.
template <typename Taken>
__device__ __forceinline__ void write_taken(const Image& image, Taken is_taken,
                                            BlockCount<GreedyPolicy::kThreads>& counts, int64_t* chosen, int& turn) {
  int before = 0;
  chosen += image.place;
  for (int first = 0; first < image.tokens; first += GreedyPolicy::kThreads) {
    const int token = first + threadIdx.x;
    const bool taken = token < image.tokens && is_taken(token);
    const unsigned lanes = __ballot_sync(kAllLanes, taken);
    const auto sums = counts.add_up(__popc(lanes), turn++);
    if (taken) chosen[before + sums.earlier_warps + __popc(lanes & earlier_lanes())] = image.first + token;
    before += sums.block;
  }
}

}  // namespace vlmfast
