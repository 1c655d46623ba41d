// One token's row of an attention map, summed over the heads, in two launches. In the first, a block takes some keys of
// one head, and writes their logits and, for each 32 of them, the maximum and the sum of the exponentials. The second
// joins these into the normaliser of each head and sums over the heads.
#pragma once

#include "common/row_policy.cuh"

namespace vlmfast {

// The maximum of some logits and the sum of their exponentials, in powers of two. Normalisers can be joined in any
// number. A NaN logit does not become the maximum, but makes the sum NaN.
struct Normaliser {
  float maximum = -INFINITY, sum = 0.f;

  // Returns what is subtracted from the logits: 0 if all are -inf, so that their exponentials are 0 and not NaN.
  static __device__ __forceinline__ float base(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }

  __device__ __forceinline__ void join(float other_maximum, float other_sum) {
    const float largest = max(maximum, other_maximum), from = base(largest);
    sum = sum * fast_exp2(maximum - from) + other_sum * fast_exp2(other_maximum - from);
    maximum = largest;
  }

  // Joins the normalisers of groups of kLanes adjacent lanes.
  template <int kLanes>
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const float other_maximum = __shfl_xor_sync(kAllLanes, maximum, offset, kLanes);
      join(other_maximum, __shfl_xor_sync(kAllLanes, sum, offset, kLanes));
    }
  }
};

struct RowSizes {
  int64_t batch, heads, tokens;
  int head_dim;
  int64_t group;         // query heads per key head
  int64_t chunks;        // chunks of a head's tokens
  int64_t left_out;      // the column that is not stored, or `tokens` for none
  float factor;          // from dots to exponents of 2
  float parts;           // the divisor of the sums over the heads
  const uint8_t* valid;  // (batch, tokens), 0 for masked tokens; null if there are none
  int64_t valid_stride;  // between sequences, in elements

  __device__ __forceinline__ bool sees(int64_t sequence, int64_t token) const {
    return valid == nullptr || valid[sequence * valid_stride + token] != 0;
  }
};

struct RowAttentionPolicy {
  static constexpr int kThreads = 128;
  static constexpr int kChunk = kThreads;        // tokens of a block; gives enough blocks for five crops of 16 heads
  static constexpr int kParts = kChunk / kWarp;  // normalisers of a chunk, one for each warp
  static constexpr int kRows = 4;                // keys in flight for each group of threads
  static constexpr int kHeads = 32;              // heads whose normalisers are in shared memory at a time
};

// Longer heads: what does not fit in registers is read again for each key.
template <int kVec>
using LongHeadRow = RowPolicy<kVec, 32, 2, 5, true>;

// Limited (row_logits_kernel): each key is read once, and reduced over its few channels for each query of its head; of
// one image there are fewer blocks than multiprocessors, each of which has four keys of 64 channels per group in flight
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(RowAttentionPolicy::kThreads, 1)
    row_logits_kernel(Input<scalar_t, 3> query,    // (batch, heads, head_dim)
                      Input<scalar_t, 4> key,      // (batch, heads / group, tokens, head_dim)
                      float2* __restrict__ parts,  // (batch, heads, chunks * kParts)
                      float* __restrict__ logits,  // (batch, heads, tokens), not yet times `factor`
                      RowSizes sizes) {
  constexpr int kVec = Policy::kVec, kRows = RowAttentionPolicy::kRows, kChunk = RowAttentionPolicy::kChunk;
  using Vec = Vector<scalar_t, kVec>;
  static_assert(Policy::kThreadsPerRow <= kWarp && Policy::kThreads == RowAttentionPolicy::kThreads,
                "rows are warps' own");
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> group_sum;
  __shared__ float chunk_logits[kChunk];

  for (int64_t work = blockIdx.x; work < sizes.batch * sizes.heads * sizes.chunks; work += gridDim.x) {
    const int64_t head_index = work / sizes.chunks, chunk = work % sizes.chunks;
    const int64_t batch = head_index / sizes.heads, head = head_index % sizes.heads, first = chunk * kChunk;
    const int64_t key_head = head / sizes.group;
    const int count = static_cast<int>(min(sizes.tokens - first, int64_t{kChunk}));
    const scalar_t* const query_row = query.at(batch, head);
    Vec queries[Policy::kVectors];
    Policy::for_kept(sizes.head_dim, [&](int k, int column) { queries[k] = Vec::load(query_row + column); });
    __syncthreads();  // all threads are done with the previous chunk

    for (int base = 0; base < count; base += Policy::kRowsPerBlock * kRows) {
      Vec values[kRows][Policy::kVectors];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int token = base + row * Policy::kRowsPerBlock + Policy::group();
        if (token >= count) continue;
        const scalar_t* const key_row = key.at(batch, key_head, first + token);
        Policy::for_kept(sizes.head_dim, [&](int k, int column) { values[row][k] = Vec::load(key_row + column); });
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int token = base + row * Policy::kRowsPerBlock + Policy::group();
        const int end =
            token < count ? sizes.head_dim : 0;  // groups past the last token only take part in the shuffles
        float logit[1] = {0.f};
        const auto add = [&](const Vec& own, const Vec& other) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum += own[i] * other[i];
          logit[0] += sum;
        };
        Policy::for_kept(end, [&](int k, int) { add(queries[k], values[row][k]); });
        Policy::for_rest(end, [&](int column) {
          add(Vec::load(query_row + column), Vec::load(key.at(batch, key_head, first + token) + column));
        });
        group_sum.add_up(logit, 0);
        if (token < count && Policy::first() == 0) chunk_logits[token] = logit[0];
      }
    }
    __syncthreads();

    const int token = threadIdx.x;
    Normaliser part;
    if (token < count) {
      logits[head_index * sizes.tokens + first + token] = chunk_logits[token];
      if (sizes.sees(batch, first + token)) {
        part.maximum = chunk_logits[token] * sizes.factor;
        part.sum = fast_exp2(fmaf(chunk_logits[token], sizes.factor, -Normaliser::base(part.maximum)));
      }
    }
    part.join_lanes<kWarp>();
    if (token % kWarp == 0) {
      parts[work * RowAttentionPolicy::kParts + token / kWarp] = make_float2(part.maximum, part.sum);
    }
  }
}

// Limited (row_scores_kernel): a thread adds up the heads of a key: of a few rows there are too few blocks
inline __global__ void __launch_bounds__(RowAttentionPolicy::kThreads)
    row_scores_kernel(const float2* __restrict__ parts,  // (batch, heads, chunks * kParts)
                      const float* __restrict__ logits,  // (batch, heads, tokens)
                      float* __restrict__ scores,        // (batch, tokens), without the column left_out
                      RowSizes sizes) {
  constexpr int kHeads = RowAttentionPolicy::kHeads, kWarps = RowAttentionPolicy::kThreads / kWarp, kTogether = 4;
  __shared__ float2 normalisers[kHeads];  // the maximum and the inverse sum
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t parts_per_head = sizes.chunks * RowAttentionPolicy::kParts;
  for (int64_t work = blockIdx.x; work < sizes.batch * sizes.chunks; work += gridDim.x) {
    const int64_t batch = work / sizes.chunks;
    const int64_t token = work % sizes.chunks * RowAttentionPolicy::kChunk + threadIdx.x;
    const bool wanted = token < sizes.tokens && token != sizes.left_out;
    const bool seen = wanted && sizes.sees(batch, token);
    float score = 0.f;
    for (int64_t first = 0; first < sizes.heads; first += kHeads) {
      const int count = static_cast<int>(min(sizes.heads - first, int64_t{kHeads}));
      __syncthreads();  // all threads are done with the previous heads
      for (int head = warp; head < count; head += kWarps) {
        const float2* const head_parts = parts + (batch * sizes.heads + first + head) * parts_per_head;
        Normaliser whole;
        for (int64_t part = lane; part < parts_per_head; part += kWarp) {
          whole.join(head_parts[part].x, head_parts[part].y);
        }
        whole.join_lanes<kWarp>();
        if (lane == 0) normalisers[head] = make_float2(whole.maximum, 1.f / whole.sum);
      }
      __syncthreads();
      if (!seen) continue;
      const float* const own = logits + (batch * sizes.heads + first) * sizes.tokens + token;
      for (int head = 0; head < count; head += kTogether) {
        float sum = 0.f;  // of a few heads, because one sum of all would be rounded more often
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (head + i >= count) break;
          const float2 normaliser = normalisers[head + i];
          sum += fast_exp2(fmaf(own[(head + i) * sizes.tokens], sizes.factor, -normaliser.x)) * normaliser.y;
        }
        score += sum;
      }
    }
    const int64_t columns = sizes.tokens - (sizes.left_out < sizes.tokens);
    if (wanted) scores[batch * columns + token - (token > sizes.left_out)] = score / sizes.parts;
  }
}

}  // namespace vlmfast
