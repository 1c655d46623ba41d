// The attention that each token receives, in three launches: the normaliser of each row of the map, the sums of its
// columns, and their mean over heads and groups. The first two are one kernel. The second pass swaps queries and keys,
// so that its sums also run along the rows of a block. There are no atomics, and the map is never stored.
#pragma once

#include "attention_scores/attention_tiles.cuh"
#include "attention_scores/row_attention.cuh"

namespace vlmfast {

struct ReceivedSizes {
  int64_t heads;
  int tokens, head_dim, bounds;
  const int32_t* cu_seqlens;  // (bounds,), or null for one segment
  float factor;               // from dots to exponents of 2

  // Returns the begin and end of a token's segment, clamped to the tokens whatever cu_seqlens holds.
  __device__ __forceinline__ int2 segment(int token) const {
    if (cu_seqlens == nullptr) return make_int2(0, tokens);
    const int low = count_first(bounds, [&](int middle) { return cu_seqlens[middle] <= token; });
    const int begin = low > 0 ? cu_seqlens[low - 1] : 0, end = low < bounds ? cu_seqlens[low] : tokens;
    return make_int2(max(begin, 0), min(end, tokens));
  }
};

// The first pass: the maximum and the inverse sum of each query's row.
template <typename Tiles>
struct RowNormalisers {
  using Result = float2;
  static constexpr bool kNeedsNormalisers = false;
  Normaliser rows[Tiles::kRows];

  template <typename Inside>
  __device__ __forceinline__ void take(const float (&logits)[Tiles::kRows][Tiles::kPartColumns], int, const float2*,
                                       float factor, Inside inside) {
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) {
      float largest = rows[r].maximum;
#pragma unroll
      for (int c = 0; c < Tiles::kPartColumns; ++c) {
        if (inside(r, c)) largest = max(largest, logits[r][c] * factor);
      }
      const float from = Normaliser::base(largest);
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < Tiles::kPartColumns; ++c) {
        if (inside(r, c)) sum += fast_exp2(fmaf(logits[r][c], factor, -from));
      }
      rows[r].join(largest, sum);
    }
  }

  __device__ __forceinline__ float2 finish(int r) {
    rows[r].template join_lanes<Tiles::kLanes>();
    return make_float2(rows[r].maximum, 1.f / rows[r].sum);
  }
};

// The second pass, in which rows are keys and columns queries: the attention that each key receives.
template <typename Tiles>
struct ReceivedSums {
  using Result = float;
  static constexpr bool kNeedsNormalisers = true;
  float received[Tiles::kRows] = {};

  template <typename Inside>
  __device__ __forceinline__ void take(const float (&logits)[Tiles::kRows][Tiles::kPartColumns], int part,
                                       const float2* normalisers, float factor, Inside inside) {
    float sums[Tiles::kRows] = {};  // separate sums per part: shorter chains have smaller errors
#pragma unroll
    for (int c = 0; c < Tiles::kPartColumns; ++c) {
      const float2 normaliser = normalisers[Tiles::column(part, c)];
#pragma unroll
      for (int r = 0; r < Tiles::kRows; ++r) {
        if (inside(r, c)) sums[r] += fast_exp2(fmaf(logits[r][c], factor, -normaliser.x)) * normaliser.y;
      }
    }
#pragma unroll
    for (int r = 0; r < Tiles::kRows; ++r) received[r] += sums[r];
  }

  __device__ __forceinline__ float finish(int r) {
#pragma unroll
    for (int offset = Tiles::kLanes / 2; offset > 0; offset /= 2) {
      received[r] += __shfl_xor_sync(0xffffffffu, received[r], offset, Tiles::kLanes);
    }
    return received[r];
  }
};

template <typename Tiles>
struct ReceivedShared {
  typename Tiles::Shared tiles;
  float2 normalisers[2][Tiles::kColumns];
};

template <typename Tiles, template <typename> typename Pass>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    received_pass_kernel(Input<typename Tiles::scalar_t, 3> own_rows,         // (heads, tokens, head_dim)
                         Input<typename Tiles::scalar_t, 3> other_rows,       // (heads, tokens, head_dim)
                         const float2* __restrict__ normalisers,              // (heads, tokens), of the other rows
                         typename Pass<Tiles>::Result* __restrict__ results,  // (heads, tokens), of the own rows
                         ReceivedSizes sizes) {
  using scalar_t = typename Tiles::scalar_t;
  constexpr int kRows = Tiles::kRows, kColumns = Tiles::kColumns;
  VLMFAST_DYNAMIC_SHARED(ReceivedShared<Tiles>, shared);
  const int blocks_per_head = (sizes.tokens + Tiles::kOwnRows - 1) / Tiles::kOwnRows, last = sizes.tokens - 1;
  for (int64_t work = blockIdx.x; work < sizes.heads * blocks_per_head; work += gridDim.x) {
    const int64_t head = work / blocks_per_head;
    const int own_first = static_cast<int>(work % blocks_per_head) * Tiles::kOwnRows;
    const TileRows<scalar_t> own{{own_rows.at(head, 0), {own_rows.strides[1]}}, sizes.tokens, sizes.head_dim};
    const TileRows<scalar_t> others{{other_rows.at(head, 0), {other_rows.strides[1]}}, sizes.tokens, sizes.head_dim};
    const float2* const head_normalisers = normalisers + head * sizes.tokens;
    int2 segments[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) segments[r] = sizes.segment(min(own_first + Tiles::row(r), last));
    const int2 first_segment = sizes.segment(own_first);
    const int2 last_segment = sizes.segment(min(own_first + Tiles::kOwnRows - 1, last));

    Tiles tiles(shared->tiles);
    Pass<Tiles> pass;
    tiles.keep(own, own_first);
    tiles.fetch(others, first_segment.x);
    int buffer = 0;
    for (int first = first_segment.x; first < last_segment.y; first += kColumns, buffer ^= 1) {
      if constexpr (Pass<Tiles>::kNeedsNormalisers) {
        const int column = threadIdx.x;
        if (column < kColumns) {
          const bool exists = first + column < sizes.tokens;
          shared->normalisers[buffer][column] = exists ? head_normalisers[first + column] : make_float2(0.f, 0.f);
        }
      }
      tiles.stage(others, first, buffer);
      if (first + kColumns < last_segment.y) tiles.fetch(others, first + kColumns);
      const bool whole = first >= last_segment.x && first + kColumns <= first_segment.y;
      tiles.multiply(own, others, own_first, first, buffer, [&](int part, const auto& logits) {
        const auto take = [&](auto inside) {
          pass.take(logits, part, shared->normalisers[buffer], sizes.factor, inside);
        };
        if (whole) {  // the segments of all rows contain the whole tile
          take([](int, int) { return true; });
        } else {
          take([&](int r, int c) {
            const int column = first + Tiles::column(part, c);
            return column >= segments[r].x && column < segments[r].y;
          });
        }
      });
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto result = pass.finish(r);
      const int row = own_first + Tiles::row(r);
      if (threadIdx.x % Tiles::kLanes == 0 && row < sizes.tokens) results[head * sizes.tokens + row] = result;
    }
  }
}

constexpr int kMeanThreads = 128;

// One thread per score.
inline __global__ void __launch_bounds__(kMeanThreads)
    received_mean_kernel(const float* __restrict__ received,  // (heads, groups * group)
                         float* __restrict__ scores,          // (groups,)
                         int64_t heads, int64_t groups, int64_t group) {
  for (int64_t i = int64_t{blockIdx.x} * kMeanThreads + threadIdx.x; i < groups;
       i += int64_t{gridDim.x} * kMeanThreads) {
    float sum = 0.f;
    for (int64_t token = i * group; token < (i + 1) * group; ++token) {
      float of_heads = 0.f;
#pragma unroll 8
      for (int64_t head = 0; head < heads; ++head) of_heads += received[head * groups * group + token];
      sum += of_heads / heads;
    }
    scores[i] = sum / group;
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<Tiles>): tensor cores for heads of up to 128 elements in half precision, else FMAs.
template <typename Function>
void with_tiles(Dtype dtype, int64_t head_dim, bool in_vectors, Function&& function) {
  with_dtype(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (!std::is_same_v<scalar_t, float>) {
      constexpr int kVec = kVectorBytes / sizeof(scalar_t), kMostSteps = 8;
      const int64_t steps = (head_dim + 15) / 16;
      if (in_vectors && steps <= 4) return function(Type<TensorTiles<scalar_t, 4, kVec>>());
      if (in_vectors && steps <= 5) return function(Type<TensorTiles<scalar_t, 5, kVec>>());
      if (in_vectors && steps <= kMostSteps) return function(Type<TensorTiles<scalar_t, kMostSteps, kVec>>());
      if (steps <= kMostSteps) return function(Type<TensorTiles<scalar_t, kMostSteps, 1>>());
    }
    function(Type<PlainTiles<scalar_t>>());
  });
}

}  // namespace vlmfast
