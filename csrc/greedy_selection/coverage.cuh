// Chooses tokens that cover all rows. The gain of a token, how much it adds to the cover, only shrinks, so an earlier
// gain is an upper bound. In each step a warp recomputes only the few gains whose bounds are above all others of the
// warp.
#pragma once

#include "greedy_selection/greedy.cuh"

namespace vlmfast {

// The state of an image.
struct CoverageState {
  float *weight, *covered;  // (rows,)
  float *quality, *bound;   // (tokens,); bound: of the gain, or kTaken
  float* step;              // (tokens,): the step that computed the gain

  // Returns the size of the state of all.
  static int64_t size(const CoverageArguments& args) {
    return 2 * args.images.count * args.rows + 3 * args.batch * args.tokens;
  }
  __device__ __forceinline__ CoverageState(float* numbers, int tokens, int rows)
      : weight(numbers),
        covered(numbers + rows),
        quality(numbers + 2 * rows),
        bound(quality + tokens),
        step(bound + tokens) {}
};

// Returns the similarity, or 0 if it is not finite: then it covers nothing.
__device__ __forceinline__ float sound(float similarity) { return fabsf(similarity) < INFINITY ? similarity : 0.f; }

// Adds up, on all lanes of a warp, how much better a token would cover the rows. The order of the sum is fixed, so that
// gains never grow, to the last bit.
template <typename scalar_t>
__device__ __forceinline__ float gain_of(const scalar_t* similarity, const CoverageState& state, int rows) {
  float gain = 0.f;
#pragma unroll 4
  for (int row = threadIdx.x % kWarp; row < rows; row += kWarp) {
    gain += fmaxf(sound(to_float(similarity[row])) - state.covered[row], 0.f) * state.weight[row];
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) gain += __shfl_xor_sync(kAllLanes, gain, offset);
  return gain;
}

// Finds the token of the warp with the highest gain. Only one lane reads and writes a token's bound.
template <typename scalar_t>
__device__ __forceinline__ Best best_of_warp(const Input<scalar_t, 3>& similarity, const Image& image,
                                             const CoverageState& state, int rows, int step) {
  constexpr int kWarps = GreedyPolicy::kWarps;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp;
  while (true) {
    Best best;
    for (int token = first + lane * kWarps; token < image.tokens; token += kWarps * kWarp) {
      if (state.bound[token] != kTaken) best.offer(state.bound[token], token);
    }
    const unsigned own = best.token;
    best.take_best_of_warp();
    if (best.key == 0) return best;  // all are taken
    const bool is_own = own == best.token;
    const bool is_new = __ballot_sync(kAllLanes, is_own && state.step[own] == step) != 0;
    if (is_new) return best;
    const scalar_t* const covering = similarity.at(image.row, int64_t{image.first} + best.token);
    const float gain = gain_of(covering, state, rows) * state.quality[best.token];
    if (is_own) {
      state.bound[own] = gain;
      state.step[own] = step;
    }
  }
}

// Limited (coverage_kernel): a block has an image, and each choice waits for the one before
template <typename scalar_t>
__global__ void __launch_bounds__(GreedyPolicy::kThreads, 1)
    coverage_kernel(Input<scalar_t, 3> similarity,  // (batch, tokens, rows)
                    Weights row_weights,            // (images, rows), or none
                    Weights quality,                // (batch, tokens), or none
                    float* __restrict__ states,     // (CoverageState::size,)
                    int64_t* __restrict__ chosen,   // (batch, k)
                    Images images, int rows) {
  __shared__ BlockBest block_best;
  __shared__ BlockCount<GreedyPolicy::kThreads> counts;
  int turn = 0;
  for (int64_t number = blockIdx.x; number < images.count; number += gridDim.x) {
    const Image image = images.at(number);
    const int tokens = image.tokens;
    const CoverageState state(states + 2 * number * rows + 3 * image.token, tokens, rows);
    VLMFAST_DEVICE_ASSERT(read_weights(row_weights, number, 0, rows, state.weight),
                          "row_weights must be finite and not negative");
    VLMFAST_DEVICE_ASSERT(read_weights(quality, image.row, image.first, tokens, state.quality),
                          "quality must be finite and not negative");
    for_own(rows, [&](int row) { state.covered[row] = 0.f; });
    if (image.k == 0) continue;
    __syncthreads();  // all weights are written
    for (int token = threadIdx.x / kWarp + threadIdx.x % kWarp * GreedyPolicy::kWarps; token < tokens;
         token += GreedyPolicy::kThreads) {
      state.bound[token] = INFINITY;
      state.step[token] = -1.f;
    }
    for (int step = 0; step < image.k; ++step) {
      const Best own = best_of_warp(similarity, image, state, rows, step);
      const int best = block_best.find(own, turn++);
      if (static_cast<unsigned>(best) == own.token && threadIdx.x % kWarp == best / GreedyPolicy::kWarps % kWarp) {
        state.bound[best] = kTaken;
      }
      const scalar_t* const covering = similarity.at(image.row, int64_t{image.first} + best);
      for_own(rows, [&](int row) { state.covered[row] = fmaxf(state.covered[row], sound(to_float(covering[row]))); });
      __syncthreads();  // the rows are covered
    }
    write_taken(image, [&](int token) { return state.bound[token] == kTaken; }, counts, chosen, turn);
  }
}

}  // namespace vlmfast
