// Chooses the most likely tokens of a determinantal point process, given the Gram matrix of the tokens.
#pragma once

#include "greedy_selection/farthest.cuh"

namespace vlmfast {

// The state of an image: an incremental Cholesky decomposition. The shares of a chosen token are its row of the factor,
// and the square of each share is subtracted from what is left of the square of its token.
struct DppState {
  float *inverse, *relevance, *left;  // (tokens,); left: or kTaken
  float* shares;                      // (k, tokens)

  static constexpr int64_t rows(int64_t k) { return 3 + k; }
  __device__ __forceinline__ DppState(float* numbers, int tokens)
      : inverse(numbers),
        relevance(numbers + tokens),
        left(numbers + 2 * int64_t{tokens}),
        shares(numbers + 3 * int64_t{tokens}) {}

  // Offers a token. One that has nothing left comes behind all others, by its relevance.
  __device__ __forceinline__ void offer(Best& best, int token) const {
    const float own = relevance[token], worth = own * left[token] * own;
    best.offer(worth > 0.f ? worth : own, token, worth > 0.f);
  }
};

static __global__ void __launch_bounds__(GreedyPolicy::kThreads)
    dpp_map_kernel(const float* __restrict__ products,  // (batch, tokens, tokens), the Gram matrices
                   Weights relevance,                   // (batch, tokens), or none
                   float* __restrict__ states,          // (batch, DppState::rows(k), tokens)
                   int64_t* __restrict__ chosen,        // (batch, k)
                   GreedyPolicy policy) {
  __shared__ BlockBest block_best;
  __shared__ BlockCount<GreedyPolicy::kThreads> counts;
  const int tokens = policy.tokens;
  int turn = 0;
  for (int64_t batch = blockIdx.x; batch < policy.batch; batch += gridDim.x) {
    const float* const product = products + batch * tokens * tokens;
    const DppState state(states + batch * DppState::rows(policy.k) * tokens, tokens);
    VLMFAST_DEVICE_ASSERT(read_weights(relevance, batch, tokens, state.relevance),
                          "relevance must be finite and not negative");
    if (policy.k == 0) continue;
    Best own;
    for_own(tokens, [&](int token) {
      const float inverse = inverse_length(product[token * (int64_t{tokens} + 1)]);
      state.inverse[token] = inverse;
      state.left[token] = inverse != 0.f ? 1.f : 0.f;
      state.offer(own, token);
    });
    for (int step = 0; step < policy.k; ++step) {
      const int best = block_best.find(own, turn++);  // behind its barrier all shares are written
      const float* const row = product + int64_t{best} * tokens;
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
    write_taken(tokens, [&](int token) { return state.left[token] == kTaken; }, counts, chosen + batch * policy.k,
                turn);
  }
}

}  // namespace vlmfast
