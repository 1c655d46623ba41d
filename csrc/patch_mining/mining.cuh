// Patch-info mining. A thread block takes one token and reads the token's block of the map twice: first for the
// statistics and the logit of each pixel, then for the weighted sum over the pixels, or the gradients.
//
// Each group of up to 32 lanes takes one channel at a time. A lane loads kVec adjacent pixels of a row, 16 bytes if
// rows of the block are long enough, and loops over the remaining vectors of the channel.
#pragma once

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

struct MiningSizes {
  int64_t batch, tokens, channels, height, width;
  int64_t columns, total;  // blocks in a row of the map, and in all of it
  int scale;
  float eps;
  bool listed;  // whether a list names the block of each token; otherwise the i-th token has the i-th block
};

struct MiningPolicy {
  static constexpr int kThreads = 256;
  static constexpr int kMostPixels = 1024;
  static constexpr int kSamples = 32;  // channels whose mean is subtracted first, against cancellation in the variance
  static constexpr int kRows = 8;      // floats per pixel in shared memory
  static constexpr float kMaximum = 3.4028234663852886e38f;

  int vectors, lanes;  // vectors in a channel of a block, and lanes that take it

  MiningPolicy(int scale, int vec) : vectors(scale * scale / vec), lanes(1) {
    while (lanes < kWarp && lanes < vectors) lanes *= 2;
  }
};

// Per-pixel values of a block, in shared memory. The gradient of a pixel is
// weight * grad + slope * query - constant - along * d, where d is the centred pixel.
struct PixelRows {
  float *mean, *inverse, *logit, *weight, *reached, *slope, *constant, *along;

  __device__ __forceinline__ PixelRows(float* rows, int pixels)
      : mean(rows),
        inverse(rows + pixels),
        logit(rows + 2 * pixels),
        weight(rows + 3 * pixels),
        reached(rows + 4 * pixels),
        slope(rows + 5 * pixels),
        constant(rows + 6 * pixels),
        along(rows + 7 * pixels) {}
};

template <typename Join>
__device__ __forceinline__ float over_lanes(float value, int lanes, Join join) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, offset, kWarp));
  }
  return value;
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// Adds up the groups' partial sums of the pixels from `first` on, and writes the sums.
template <int kVec>
__device__ __forceinline__ void add_groups(const float (&own)[kVec], float* partial, int lanes, int first, int pixels,
                                           float* sums) {
  const int columns = lanes * kVec, groups = MiningPolicy::kThreads / lanes;
  __syncthreads();  // all threads are done with the previous sums, and with the block before this one
#pragma unroll
  for (int i = 0; i < kVec; ++i) partial[threadIdx.x * kVec + i] = own[i];
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += MiningPolicy::kThreads) {
    float sum = 0.f;
    for (int group = 0; group < groups; ++group) sum += partial[group * columns + column];
    if (first + column < pixels) sums[first + column] = sum;
  }
}

// Turns the logits into softmax weights times the inverse deviation and, in the backward, computes the terms of the
// pixel gradients. Called by one warp.
template <bool kBackward>
__device__ __forceinline__ void weigh(const PixelRows& rows, int pixels, float channels, float query_sum,
                                      float grad_sum) {
  constexpr float kMaximum = MiningPolicy::kMaximum, kLog2E = 1.4426950408889634f;
  const int lane = threadIdx.x % kWarp;
  const auto clean = [](float logit) { return logit == logit ? min(max(logit, -kMaximum), kMaximum) : 0.f; };
  float largest = -kMaximum, sum = 0.f, average = 0.f;
  for (int pixel = lane; pixel < pixels; pixel += kWarp) largest = max(largest, clean(rows.logit[pixel]));
  largest = over_lanes(largest, kWarp, Larger());
  for (int pixel = lane; pixel < pixels; pixel += kWarp) {
    const float weight = fast_exp2((clean(rows.logit[pixel]) - largest) * kLog2E);
    rows.weight[pixel] = weight;
    sum += weight;
    if constexpr (kBackward) average += weight * rows.reached[pixel];
  }
  const float scale = 1.f / over_lanes(sum, kWarp, Add());
  if constexpr (kBackward) average = over_lanes(average, kWarp, Add()) * scale;
  for (int pixel = lane; pixel < pixels; pixel += kWarp) {
    const float weight = rows.weight[pixel] * scale, inverse = rows.inverse[pixel];
    rows.weight[pixel] = weight * inverse;
    if constexpr (kBackward) {
      const float logit = rows.logit[pixel], reached = rows.reached[pixel];
      const bool finite = logit >= -kMaximum && logit <= kMaximum;
      const float slope = finite ? weight * (reached - average) : 0.f;
      rows.slope[pixel] = slope * inverse;
      rows.constant[pixel] = inverse * (weight * grad_sum + slope * query_sum) / channels;
      rows.along[pixel] = inverse * inverse * (weight * reached + (finite ? slope * logit : 0.f)) / channels;
    }
  }
}

// The block of the map that one iteration takes, and its token.
struct BlockPlace {
  int64_t batch, token, row, column;
  bool has_token = true;

  template <bool kBackward>
  __device__ __forceinline__ static BlockPlace of(int64_t work, const Input<int64_t, 2>& blocks,
                                                  const MiningSizes& sizes) {
    const int64_t units = kBackward ? sizes.total : sizes.tokens;
    BlockPlace place{work / units, work % units, 0, 0};
    int64_t number = place.token;
    if (sizes.listed && kBackward) {  // the backward visits every block: search it in the list
      const int64_t* const list = blocks.at(place.batch);
      const int tokens = static_cast<int>(sizes.tokens);
      place.token = count_first(tokens, [&](int i) { return list[i] < number; });
      place.has_token = place.token < tokens && list[place.token] == number;
    } else if (sizes.listed) {
      number = min(max(blocks.at(place.batch)[place.token], int64_t{0}), sizes.total - 1);
    }
    place.row = number / sizes.columns * sizes.scale;
    place.column = number % sizes.columns * sizes.scale;
    return place;
  }
};

// Accumulates the sums over channels for the statistics and logits, and in `totals` those of the query's row and of the
// gradient's.
template <typename scalar_t, int kVec, bool kBackward, typename Source>
__device__ __forceinline__ void add_channels(const scalar_t* query_row, const scalar_t* grad_row, const Source& source,
                                             const PixelRows& rows, float* partial, float (&totals)[2], int samples,
                                             const MiningSizes& sizes, const MiningPolicy& policy) {
  using Vec = Vector<scalar_t, kVec>;
  const int lanes = policy.lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int groups = MiningPolicy::kThreads / lanes, pixels = sizes.scale * sizes.scale;
  for (int first = 0; first < policy.vectors; first += lanes) {
    const int vector = first + lane;
    const bool valid = vector < policy.vectors;
    const int64_t channels = valid ? sizes.channels : 0;
    float shifts[kVec] = {}, sums[kVec] = {}, squares[kVec] = {}, logits[kVec] = {}, reached[kVec] = {};
    for (int sample = group; valid && sample < samples; sample += groups) {
      const Vec values = Vec::load(source(vector, sample * channels / samples));
#pragma unroll
      for (int i = 0; i < kVec; ++i) shifts[i] += values[i];
    }
    add_groups<kVec>(shifts, partial, lanes, first * kVec, pixels, rows.mean);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kVec; ++i) shifts[i] = valid ? rows.mean[vector * kVec + i] / samples : 0.f;
#pragma unroll 4
    for (int64_t channel = group; channel < channels; channel += groups) {
      const Vec values = Vec::load(source(vector, channel));
      const float own = to_float(query_row[channel]), grad = kBackward ? to_float(grad_row[channel]) : 0.f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = values[i] - shifts[i];
        sums[i] += centred;
        squares[i] = fmaf(centred, centred, squares[i]);
        logits[i] = fmaf(centred, own, logits[i]);
        if constexpr (kBackward) reached[i] = fmaf(centred, grad, reached[i]);
      }
      if (vector == 0) {
        totals[0] += own;
        totals[1] += grad;
      }
    }
    add_groups<kVec>(sums, partial, lanes, first * kVec, pixels, rows.weight);
    add_groups<kVec>(squares, partial, lanes, first * kVec, pixels, rows.inverse);
    add_groups<kVec>(logits, partial, lanes, first * kVec, pixels, rows.logit);
    if constexpr (kBackward) add_groups<kVec>(reached, partial, lanes, first * kVec, pixels, rows.reached);
  }
}

// Computes the statistics and logits from the sums.
template <bool kBackward>
__device__ __forceinline__ void finish(const PixelRows& rows, const float (&totals)[2], int samples,
                                       const MiningSizes& sizes) {
  const float channels = static_cast<float>(sizes.channels);
  for (int pixel = threadIdx.x; pixel < sizes.scale * sizes.scale; pixel += MiningPolicy::kThreads) {
    const float rest = rows.weight[pixel] / channels;
    const float variance = max(rows.inverse[pixel] / channels - rest * rest, 0.f);
    const float inverse = 1.f / sqrtf(variance + sizes.eps);
    rows.mean[pixel] = rows.mean[pixel] / samples + rest;
    rows.inverse[pixel] = inverse;
    rows.logit[pixel] = (rows.logit[pixel] - rest * totals[0]) * inverse;
    if constexpr (kBackward) rows.reached[pixel] = (rows.reached[pixel] - rest * totals[1]) * inverse;
  }
}

// Limited (mining_kernel): a block has a token: of a few there are too few; each element takes part in two moments, a
// product with the query and the sum of its block
template <typename scalar_t, int kVec, bool kBackward>
__global__ void __launch_bounds__(MiningPolicy::kThreads, 1)
    mining_kernel(Input<scalar_t, 3> query,        // (batch, tokens, channels)
                  Input<scalar_t, 3> grad_output,  // (batch, tokens, channels), in the backward
                  Input<scalar_t, 4> map,          // (batch, channels, height, width)
                  Input<int64_t, 2> blocks,        // (batch, tokens), if listed
                  scalar_t* __restrict__ y,  // (batch, tokens, channels): the mined features or the gradient of query
                  scalar_t* __restrict__ grad_map,  // (batch, channels, height, width), in the backward
                  MiningSizes sizes, MiningPolicy policy) {
  using Vec = Vector<scalar_t, kVec>;
  constexpr int kThreads = MiningPolicy::kThreads;
  VLMFAST_DYNAMIC_SHARED(float, shared);
  __shared__ float partial[kThreads * kVec];
  __shared__ GroupSum<kThreads, 2> group_sum;
  const int pixels = sizes.scale * sizes.scale, per_row = sizes.scale / kVec, lanes = policy.lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  const int64_t channels = sizes.channels, units = kBackward ? sizes.total : sizes.tokens;
  const int samples = static_cast<int>(min(channels, int64_t{MiningPolicy::kSamples}));
  const PixelRows rows(shared, pixels);
  int turn = 0;

  for (int64_t work = blockIdx.x; work < sizes.batch * units; work += gridDim.x) {
    const BlockPlace place = BlockPlace::of<kBackward>(work, blocks, sizes);
    const auto source = [&](int vector, int64_t channel) {
      return map.at(place.batch, channel, place.row + vector / per_row) + place.column + vector % per_row * kVec;
    };
    const auto gradient = [&](int vector, int64_t channel) {
      const int64_t row = (place.batch * channels + channel) * sizes.height + place.row + vector / per_row;
      return grad_map + row * sizes.width + place.column + vector % per_row * kVec;
    };
    if (kBackward && !place.has_token) {
      Vec zeros;
      zeros.fill([](int) { return 0.f; });
      for (int64_t channel = group; channel < channels; channel += groups) {
        for (int vector = lane; vector < policy.vectors; vector += lanes) zeros.store(gradient(vector, channel));
      }
      continue;
    }
    const scalar_t* const query_row = query.at(place.batch, place.token);
    const scalar_t* const grad_row = kBackward ? grad_output.at(place.batch, place.token) : query_row;
    float totals[2] = {0.f, 0.f};
    add_channels<scalar_t, kVec, kBackward>(query_row, grad_row, source, rows, partial, totals, samples, sizes, policy);
    group_sum.add_up(totals, turn++);
    __syncthreads();
    finish<kBackward>(rows, totals, samples, sizes);
    __syncthreads();
    if (threadIdx.x < kWarp) weigh<kBackward>(rows, pixels, channels, totals[0], totals[1]);
    __syncthreads();

    const float* const factors = kBackward ? rows.slope : rows.weight;
    scalar_t* const to = y + (place.batch * sizes.tokens + place.token) * channels;
    for (int64_t base = 0; base < channels; base += groups) {
      const int64_t channel = base + group;
      float sum = 0.f;
      for (int vector = lane; vector < (channel < channels ? policy.vectors : 0); vector += lanes) {
        const Vec values = Vec::load(source(vector, channel));
        float gradients[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const int pixel = vector * kVec + i;
          const float centred = values[i] - rows.mean[pixel];
          sum = fmaf(centred, factors[pixel], sum);
          if constexpr (kBackward) {
            const float along = fmaf(centred, rows.along[pixel], rows.constant[pixel]);
            gradients[i] = rows.weight[pixel] * to_float(grad_row[channel]) +
                           rows.slope[pixel] * to_float(query_row[channel]) - along;
          }
        }
        if constexpr (kBackward) Vec::rounded(gradients).store(gradient(vector, channel));
      }
      sum = over_lanes(sum, lanes, Add());
      if (lane == 0 && channel < channels) to[channel] = from_float<scalar_t>(sum);
    }
  }
}

}  // namespace vlmfast
