// The map from tokens to patches, and the kernels of a pixel shuffle fused with a LayerNorm over tokens or over
// patches.
#pragma once

#include "common/partial_sums.cuh"

namespace vlmfast {

// Patches have two numberings: row by row in the map, and in the order of the tokens, in which the patches of a token
// are consecutive. Numbers have 32 bits, because the conversion takes four divisions.
struct PatchMap {
  unsigned patches;                       // of an image
  unsigned width;                         // of the map, in patches
  unsigned scale, per_token, token_line;  // token_line: consecutive tokens in one row, or column, of the map
  bool by_column;

  struct Place {
    unsigned image, patch;  // the patch as it lies in the map
  };

  // Returns the image and place of a patch, given its number in the order of the tokens, counted over the batch.
  __device__ __forceinline__ Place place(unsigned ordinal) const {
    const unsigned in_image = ordinal % patches, token = in_image / per_token;
    const unsigned line = token / token_line, along = token % token_line;
    const unsigned row = by_column ? along : line, column = by_column ? line : along;
    return {ordinal / patches, (row * width + column) * scale + step(in_image % per_token)};
  }

  // Returns the distance, in patches of the map, from the first patch of a token to its `part`-th.
  __device__ __forceinline__ unsigned step(unsigned part) const { return part / scale * width + part % scale; }
};

// The normalised rows: each is all patches of a token, or one patch.
struct NormRows {
  PatchMap map;
  unsigned patches, channels;  // patches of a row, channels of a patch
  int64_t count;
  int hidden;  // patches * channels
  float input_scale, eps;

  // Returns the distance in elements from the start of a row to a column, if patches are patch_stride elements apart.
  __device__ __forceinline__ int64_t offset(int column, int64_t patch_stride) const {
    const unsigned part = column / channels;
    return map.step(part) * patch_stride + (column - part * channels);
  }

  // Returns the number of a row's first patch in the order of the tokens.
  __device__ __forceinline__ unsigned first(int64_t row) const { return row * patches; }
};

template <typename Vec>
__device__ __forceinline__ Vec scaled(Vec values, float input_scale) {
  if (input_scale != 1.f) values.fill([&](int i) { return values[i] * input_scale; });
  return values;
}

// The mean and deviation of a row. A float32 mean far from zero has a large rounding error; `shift`, the mean of the
// values centred by it, corrects for that.
struct Moments {
  float mean, shift, inverse_deviation;

  __device__ __forceinline__ Moments(float mean, float shift, float centred_squares, float eps)
      : mean(mean), shift(shift), inverse_deviation(rsqrtf(centred_squares - shift * shift + eps)) {}

  __device__ __forceinline__ float normalise(float value) const { return (value - mean - shift) * inverse_deviation; }
};

// Limited (pixel_shuffle_norm_kernel): the mean is taken twice, to be exact where it is far from zero: three sums
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerMultiprocessor)
    pixel_shuffle_norm_kernel(Input<scalar_t, 3> x,                 // (batch, patches, channels)
                              const scalar_t* __restrict__ weight,  // (hidden,)
                              const scalar_t* __restrict__ bias,    // (hidden,)
                              scalar_t* __restrict__ y,             // (rows, hidden)
                              NormRows rows) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> row_sums;
  __shared__ GroupSum<Policy::kThreadsPerRow, 2> centred_sums;

  int turn = 0;
  Policy::for_rows(rows.count, rows.hidden, [&](int64_t row, int end) {
    const auto [image, patch] = rows.map.place(rows.first(row));
    const scalar_t* const x_row = x.at(image, patch);
    const auto load = [&](int column) { return Vec::load(x_row + rows.offset(column, x.strides[1])); };
    const auto prepare = [&](const Vec& values) {
      return scaled(values, rows.input_scale).template as<Floats<kVec>>();
    };
    Vec loaded[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) { loaded[k] = load(column); });
    Floats<kVec> kept[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int) { kept[k] = prepare(loaded[k]); });
    const auto load_rest = [&](int column) { return prepare(load(column)); };

    float sum[1] = {0.f};
    Policy::for_all(end, kept, load_rest, [&](const Floats<kVec>& values, int) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[0] += values[i];
    });
    row_sums.add_up(sum, turn);
    const float mean = sum[0] / rows.hidden;

    float sums[2] = {0.f, 0.f};  // of centred values and of their squares
    Policy::for_all(end, kept, load_rest, [&](const Floats<kVec>& values, int) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = values[i] - mean;
        sums[0] += centred;
        sums[1] += centred * centred;
      }
    });
    centred_sums.add_up(sums, turn++);
    const Moments moments(mean, sums[0] / rows.hidden, sums[1] / rows.hidden, rows.eps);

    Policy::for_all(end, kept, load_rest, [&](const Floats<kVec>& values, int column) {
      const Vec weights = Vec::load(weight + column), biases = Vec::load(bias + column);
      Vec output;
      output.fill([&](int i) { return moments.normalise(values[i]) * weights[i] + biases[i]; });
      output.store(y + row * rows.hidden + column);
    });
  });
}

// ---- backward ----

// Vectors of x, which is normalised, and of the gradient of the output.
template <typename Vec>
struct NormOperands {
  Vec x, grad;
};

// The reductions for the gradient of a row. Lives in shared memory.
template <typename Policy>
struct NormGradient {
  GroupSum<Policy::kThreadsPerRow, 2> row_sums;
  GroupSum<Policy::kThreadsPerRow, 3> centred_sums;

  struct Means {
    Moments moments;
    float grad;        // mean of the scaled gradient, which is gradient * weight
    float projection;  // mean of the scaled gradient times the normalised x
  };

  // Computes the means of a row; for_row(function) calls function(operands, column) for each vector of it.
  template <typename Vec, typename scalar_t, typename ForRow>
  __device__ __forceinline__ Means means(ForRow for_row, const scalar_t* weight, const NormRows& rows, int turn) {
    float sums[2] = {0.f, 0.f};  // of x, and of the scaled gradient
    for_row([&](const NormOperands<Vec>& values, int column) {
      const Vec weights = Vec::load(weight + column);
#pragma unroll
      for (int i = 0; i < Policy::kVec; ++i) {
        sums[0] += values.x[i];
        sums[1] += values.grad[i] * weights[i];
      }
    });
    row_sums.add_up(sums, turn);
    const float mean = sums[0] / rows.hidden, mean_grad = sums[1] / rows.hidden;

    float centred_sum[3] = {0.f, 0.f, 0.f};  // of centred x, of its square, of it times the scaled gradient
    for_row([&](const NormOperands<Vec>& values, int column) {
      const Vec weights = Vec::load(weight + column);
#pragma unroll
      for (int i = 0; i < Policy::kVec; ++i) {
        const float centred = values.x[i] - mean;
        centred_sum[0] += centred;
        centred_sum[1] += centred * centred;
        centred_sum[2] += values.grad[i] * weights[i] * centred;
      }
    });
    centred_sums.add_up(centred_sum, turn);
    const Moments moments(mean, centred_sum[0] / rows.hidden, centred_sum[1] / rows.hidden, rows.eps);
    const float projection = (centred_sum[2] / rows.hidden - mean_grad * moments.shift) * moments.inverse_deviation;
    return {moments, mean_grad, projection};
  }
};

// A persistent grid: each block loops over rows and writes its part of the gradients of weight and bias to `partials`.
// Limited (pixel_shuffle_norm_backward_kernel): five sums in two passes, and each element is converted nine times, as
// registers hold it in half precision; of an image of 256 tokens, the two of a block are in flight at once
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerMultiprocessor)
    pixel_shuffle_norm_backward_kernel(Input<scalar_t, 2> grad_output,       // tokens
                                       Input<scalar_t, 3> x,                 // (batch, patches, channels)
                                       const scalar_t* __restrict__ weight,  // (hidden,)
                                       scalar_t* __restrict__ grad_x,        // (batch, patches, channels)
                                       float* __restrict__ partials,         // (gridDim.x, 2, hidden)
                                       NormRows rows) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  using Operands = NormOperands<Vec>;
  __shared__ NormGradient<Policy> gradient;
  float* const weight_partial = partials + int64_t{blockIdx.x} * 2 * rows.hidden;
  float* const bias_partial = weight_partial + rows.hidden;
  float grad_weight[Policy::kVectors][kVec] = {}, grad_bias[Policy::kVectors][kVec] = {};
  clear_rest<Policy>(weight_partial, rows.hidden);
  clear_rest<Policy>(bias_partial, rows.hidden);

  // The places of a row in the three tensors.
  struct Places {
    const scalar_t *x, *grad;
    scalar_t* grad_x;
  };
  const auto places_of = [&](int64_t row) {
    const unsigned first = rows.first(row), token = first / rows.map.per_token;
    const auto [image, patch] = rows.map.place(first);
    return Places{x.at(image, patch),
                  grad_output.at(token) + int64_t{first - token * rows.map.per_token} * rows.channels,
                  grad_x + (int64_t{image} * rows.map.patches + patch) * rows.channels};
  };
  struct Kept {
    Operands values[Policy::kVectors];
  };
  const auto load = [&](const Places& places, int column) {
    return Operands{Vec::load(places.x + rows.offset(column, x.strides[1])), Vec::load(places.grad + column)};
  };
  const auto load_kept = [&](int64_t row, int end) {
    const Places places = places_of(row);
    Kept kept;
    Policy::for_kept(end, [&](int k, int column) { kept.values[k] = load(places, column); });
    return kept;
  };
  int turn = 0;
  constexpr bool kAhead = !Policy::kUnbounded;
  Policy::template for_rows_ahead<kAhead>(rows.count, rows.hidden, load_kept,
                                          [&](int64_t row, int end, const Kept& kept) {
    const Places places = places_of(row);
    const auto prepare = [&](const Operands& values) {
      return Operands{scaled(values.x, rows.input_scale), values.grad};
    };
    Operands held[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int) { held[k] = prepare(kept.values[k]); });
    const auto load_rest = [&](int column) { return prepare(load(places, column)); };
    const auto for_row = [&](auto function) { Policy::for_all(end, held, load_rest, function); };
    const auto means = gradient.template means<Vec>(for_row, weight, rows, turn++);

    // Stores the gradient of x, and accumulates those of weight and bias.
    const auto finish = [&](const Operands& values, int column, float* weight_sums, float* bias_sums) {
      const Vec weights = Vec::load(weight + column);
      float grads[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float normed = means.moments.normalise(values.x[i]);
        const float projected = normed * means.projection;
        grads[i] =
            means.moments.inverse_deviation * (values.grad[i] * weights[i] - means.grad - projected) * rows.input_scale;
        weight_sums[i] += values.grad[i] * normed;
        bias_sums[i] += values.grad[i];
      }
      Vec::rounded(grads).store(places.grad_x + rows.offset(column, rows.channels));
    };
    Policy::for_kept(end, [&](int k, int column) { finish(held[k], column, grad_weight[k], grad_bias[k]); });
    Policy::for_rest(
        end, [&](int column) { finish(load_rest(column), column, weight_partial + column, bias_partial + column); });
  });

  store_partial<Policy>(grad_weight, weight_partial, rows.hidden);
  __syncthreads();  // the next call reuses the same shared memory
  store_partial<Policy>(grad_bias, bias_partial, rows.hidden);
}

}  // namespace vlmfast
