// Chooses the most likely tokens of a determinantal point process, given the Gram matrix of the tokens.
#pragma once

#include "greedy_selection/farthest.cuh"

namespace vlmfast {

// The state of an image: an incremental Cholesky decomposition. The shares of a chosen token are its row of the factor,
// and the square of each share is subtracted from what is left of the square of its token.
struct DppState {
  float *inverse, *relevance, *left;  // (tokens,); left: or kTaken
  float* shares;                      // (k, tokens)

  // Returns the size of the state of all: three rows, and behind them the shares, as many as are chosen.
  static int64_t size(const FeatureArguments& args, int64_t k) {
    return args.batch * (3 * args.tokens + k * args.images.longest);
  }
  __device__ __forceinline__ DppState(float* numbers, const Images& images, const Image& image)
      : inverse(numbers + 3 * image.token),
        relevance(inverse + image.tokens),
        left(relevance + image.tokens),
        shares(numbers + 3 * images.batch * images.tokens + image.place * images.longest) {}

  // Offers a token. One that has nothing left comes behind all others, by its relevance.
  __device__ __forceinline__ void offer(Best& best, int token) const {
    const float own = relevance[token], worth = own * left[token] * own;
    best.offer(worth > 0.f ? worth : own, token, worth > 0.f);
  }
};

// Limited (dpp_map_kernel): a block has an image, and each choice waits for the one before
static __global__ void __launch_bounds__(GreedyPolicy::kThreads)
    dpp_map_kernel(const float* __restrict__ products,  // (batch, tokens, longest), the Gram matrices
                   Weights relevance,                   // (batch, tokens), or none
                   float* __restrict__ states,          // (DppState::size,)
                   int64_t* __restrict__ chosen,        // (batch, k)
                   Images images) {
  __shared__ BlockBest block_best;
  __shared__ BlockCount<GreedyPolicy::kThreads> counts;
  int turn = 0;
  for (int64_t number = blockIdx.x; number < images.count; number += gridDim.x) {
    const Image image = images.at(number);
    const int tokens = image.tokens;
    const float* const product = products + image.token * images.longest;
    const DppState state(states, images, image);
    VLMFAST_DEVICE_ASSERT(read_weights(relevance, image.row, image.first, tokens, state.relevance),
                          "relevance must be finite and not negative");
    if (image.k == 0) continue;
    Best own;
    for_own(tokens, [&](int token) {
      const float inverse = inverse_length(product[token * (int64_t{images.longest} + 1)]);
      state.inverse[token] = inverse;
      state.left[token] = inverse != 0.f ? 1.f : 0.f;
      state.offer(own, token);
    });
    for (int step = 0; step < image.k; ++step) {
      const int best = block_best.find(own, turn++);  // behind its barrier all shares are written
      const float* const row = product + int64_t{best} * images.longest;
      const float inverse = state.inverse[best], left_of_best = state.left[best];
      const float scale = left_of_best > 0.f ? 1.f / sqrtf(left_of_best) : 0.f;
      __syncthreads();  // all threads have read left_of_best
      own = Best{};
      for_own(tokens, [&](int token) {
        const float left = state.left[token];
        if (left == kTaken) return;
        if (token == best) {
          state.left[token] = kTaken;
          return;
        }
        float rest = cosine_of(row[token], inverse, state.inverse[token]);
        const float* earlier = state.shares;
#pragma unroll 8
        for (int i = 0; i < step; ++i, earlier += tokens) rest -= earlier[token] * earlier[best];
        const float share = rest * scale, now = left - share * share;
        state.shares[int64_t{step} * tokens + token] = share;
        state.left[token] = now < kNothingNew ? 0.f : now;
        state.offer(own, token);
      });
    }
    write_taken(image, [&](int token) { return state.left[token] == kTaken; }, counts, chosen, turn);
  }
}

}  // namespace vlmfast
