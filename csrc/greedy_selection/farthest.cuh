// Chooses tokens that are far from each other, given the Gram matrix of the tokens.
#pragma once

#include "greedy_selection/greedy.cuh"

namespace vlmfast {

// Returns the inverse of the length, given its square; 0 for a token without a direction.
__device__ __forceinline__ float inverse_length(float square) {
  return square > 0.f && square < INFINITY ? 1.f / sqrtf(square) : 0.f;
}

__device__ __forceinline__ float cosine_of(float product, float inverse, float other_inverse) {
  const float both = inverse * other_inverse;
  return both != 0.f ? product * both : 0.f;
}

__device__ __forceinline__ float distance_of(float cosine) {
  const float distance = 1.f - cosine;
  return distance < kSame ? 0.f : distance;
}

// The state of an image. A thread reads that of its own tokens, and the lengths of all.
struct FarthestState {
  float *inverse, *weight, *nearest;  // (tokens,)

  static constexpr int kRows = 3;
  __device__ __forceinline__ FarthestState(float* rows, int tokens)
      : inverse(rows), weight(rows + tokens), nearest(rows + 2 * tokens) {}
};

// Limited (farthest_kernel): a block has an image, and each choice waits for the one before
static __global__ void __launch_bounds__(GreedyPolicy::kThreads)
    farthest_kernel(const float* __restrict__ products,  // (batch, tokens, longest), the Gram matrices
                    Weights quality,                     // (batch, tokens), or none
                    float* __restrict__ states,          // (FarthestState::kRows, batch * tokens), image by image
                    int64_t* __restrict__ chosen,        // (batch, k)
                    Images images, bool first_by_quality) {
  __shared__ BlockBest block_best;
  __shared__ BlockCount<GreedyPolicy::kThreads> counts;
  int turn = 0;
  for (int64_t number = blockIdx.x; number < images.count; number += gridDim.x) {
    const Image image = images.at(number);
    const int tokens = image.tokens;
    const float* const product = products + image.token * images.longest;
    const FarthestState state(states + image.token * FarthestState::kRows, tokens);
    VLMFAST_DEVICE_ASSERT(read_weights(quality, image.row, image.first, tokens, state.weight),
                          "quality must be finite and not negative");
    if (image.k == 0) continue;
    for_own(tokens,
            [&](int token) { state.inverse[token] = inverse_length(product[token * (int64_t{images.longest} + 1)]); });
    __syncthreads();  // all lengths are written
    Best own;
    for_own(tokens, [&](int token) {
      const float inverse = state.inverse[token];
      float largest = -1.f;  // cosine to another token
#pragma unroll 8
      for (int other = 0; other < tokens; ++other) {
        const float cosine = cosine_of(product[int64_t{other} * images.longest + token], state.inverse[other], inverse);
        if (other != token) largest = fmaxf(largest, cosine);
      }
      own.offer(first_by_quality ? distance_of(largest) * state.weight[token] : distance_of(largest), token);
      state.nearest[token] = 2.f;  // no distance is larger
    });
    for (int left = image.k; left > 0; --left) {
      const int best = block_best.find(own, turn++);
      const float* const row = product + int64_t{best} * images.longest;
      const float inverse = state.inverse[best];
      own = Best{};
      for_own(tokens, [&](int token) {
        float nearest = state.nearest[token];
        if (nearest != kTaken) {
          nearest = fminf(nearest, distance_of(cosine_of(row[token], inverse, state.inverse[token])));
          nearest = token == best ? kTaken : nearest;
          state.nearest[token] = nearest;
          if (nearest != kTaken) own.offer(nearest * state.weight[token], token);
        }
      });
    }
    write_taken(image, [&](int token) { return state.nearest[token] == kTaken; }, counts, chosen, turn);
  }
}

}  // namespace vlmfast
