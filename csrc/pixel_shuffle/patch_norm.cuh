// LayerNorm over the patches of a token or over each patch, on the way to the tokens, and its gradients.
#pragma once

#include "common/column_sums.cuh"
#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "common/row_policy.cuh"
#include "pixel_shuffle/patch_map.cuh"

namespace vlmfast {

// What is normalised together: the patches of a token, or one patch.
struct NormRows {
  PatchMap map;
  unsigned patches, channels;  // of a row, of a patch
  int64_t count;
  int size;  // patches * channels

  // From the first element of a row to that of a column, where patches are so many elements apart.
  __device__ __forceinline__ int64_t offset(int column, int64_t patch_stride) const {
    const unsigned part = column / channels;
    return map.step(part) * patch_stride + (column - part * channels);
  }

  // The number of a row's first patch in the order of the tokens.
  __device__ __forceinline__ unsigned first(int64_t row) const { return row * patches; }
};

struct NormSettings {
  float input_scale, eps;
};

template <typename scalar_t, int kVec>
__device__ __forceinline__ Vector<scalar_t, kVec> load_scaled(const scalar_t* from, float input_scale) {
  auto values = Vector<scalar_t, kVec>::load(from);
  if (input_scale != 1.f) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values.set(i, values[i] * input_scale);
  }
  return values;
}

// Mean and deviation of a row. float32 cannot hold a mean far from zero well enough: `shift`, the mean of what is
// centred by it, is what it lacks.
struct Moments {
  float mean, shift, inverse_deviation;

  __device__ __forceinline__ Moments(float mean, float shift, float centred_squares, float eps)
      : mean(mean), shift(shift), inverse_deviation(rsqrtf(centred_squares - shift * shift + eps)) {}

  __device__ __forceinline__ float normalise(float value) const { return (value - mean - shift) * inverse_deviation; }
};

template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerMultiprocessor)
    pixel_shuffle_norm_kernel(ImagePointer<scalar_t> x,
                              const scalar_t* __restrict__ weight,  // (size,)
                              const scalar_t* __restrict__ bias,    // (size,)
                              scalar_t* __restrict__ y,             // (rows, size)
                              NormRows rows, NormSettings settings) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> row_sums;
  __shared__ GroupSum<Policy::kThreadsPerRow, 2> centred_sums;
  const int size = rows.size;

  int turn = 0;
  const int64_t row_step = int64_t{gridDim.x} * Policy::kRowsPerBlock;
  for (int64_t block_row = int64_t{blockIdx.x} * Policy::kRowsPerBlock; block_row < rows.count; block_row += row_step) {
    const int64_t row = block_row + Policy::group();
    const int end = row < rows.count ? size : 0;  // a group past the last row only takes part in the shuffles
    const auto [image, patch] = rows.map.place(rows.first(row));
    const scalar_t* const x_row = x.at(image, patch);
    const auto load = [&](int column) {
      return load_scaled<scalar_t, kVec>(x_row + rows.offset(column, x.row_stride), settings.input_scale);
    };
    Vec kept[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) { kept[k] = load(column); });
    const auto for_row = [&](auto function) {  // function(values, column) for the thread's vectors
      Policy::for_kept(end, [&](int k, int column) { function(kept[k], column); });
      Policy::for_rest(end, [&](int column) { function(load(column), column); });
    };

    float sum[1] = {0.f};
    for_row([&](const Vec& values, int) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[0] += values[i];
    });
    row_sums.add_up(sum, turn);
    const float mean = sum[0] / size;

    float sums[2] = {0.f, 0.f};  // of centred values and of their squares
    for_row([&](const Vec& values, int) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = values[i] - mean;
        sums[0] += centred;
        sums[1] += centred * centred;
      }
    });
    centred_sums.add_up(sums, turn);
    const Moments moments(mean, sums[0] / size, sums[1] / size, settings.eps);

    for_row([&](const Vec& values, int column) {
      const Vec weights = Vec::load(weight + column), biases = Vec::load(bias + column);
      Vec output;
#pragma unroll
      for (int i = 0; i < kVec; ++i) output.set(i, moments.normalise(values[i]) * weights[i] + biases[i]);
      output.store(y + row * size + column);
    });
    ++turn;
  }
}

// A persistent grid: each block walks over rows and leaves its part of the gradients of weight and bias in `partials`.
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerMultiprocessor)
    pixel_shuffle_norm_backward_kernel(RowPointer<scalar_t> grad_output,  // tokens
                                       ImagePointer<scalar_t> x,
                                       const scalar_t* __restrict__ weight,  // (size,)
                                       scalar_t* __restrict__ grad_x,        // (images, patches, channels)
                                       float* __restrict__ partials,         // (gridDim.x, 2, size)
                                       NormRows rows, NormSettings settings) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  __shared__ GroupSum<Policy::kThreadsPerRow, 2> row_sums;
  __shared__ GroupSum<Policy::kThreadsPerRow, 3> centred_sums;
  const int size = rows.size;
  float* const weight_partial = partials + int64_t{blockIdx.x} * 2 * size;
  float* const bias_partial = weight_partial + size;
  float grad_weight[Policy::kVectors][kVec] = {}, grad_bias[Policy::kVectors][kVec] = {};
  Policy::for_rest(size, [&](int column) {  // too long for registers: this thread alone owns these partial sums
#pragma unroll
    for (int i = 0; i < kVec; ++i) weight_partial[column + i] = bias_partial[column + i] = 0.f;
  });

  int turn = 0;
  const int64_t row_step = int64_t{gridDim.x} * Policy::kRowsPerBlock;
  for (int64_t block_row = int64_t{blockIdx.x} * Policy::kRowsPerBlock; block_row < rows.count; block_row += row_step) {
    const int64_t row = block_row + Policy::group();
    const int end = row < rows.count ? size : 0;  // a group past the last row only takes part in the shuffles
    const unsigned first = rows.first(row), token = first / rows.map.per_token;
    const auto [image, patch] = rows.map.place(first);
    const scalar_t* const x_row = x.at(image, patch);
    const scalar_t* const grad_row = grad_output[token] + int64_t{first - token * rows.map.per_token} * rows.channels;
    scalar_t* const grad_x_row = grad_x + (int64_t{image} * rows.map.patches + patch) * rows.channels;
    const auto load = [&](int column) {
      return load_scaled<scalar_t, kVec>(x_row + rows.offset(column, x.row_stride), settings.input_scale);
    };
    Vec kept[Policy::kVectors], kept_grads[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) {
      kept[k] = load(column);
      kept_grads[k] = Vec::load(grad_row + column);
    });
    const auto for_row = [&](auto function) {  // function(values, gradients, weights) for the thread's vectors
      Policy::for_kept(end, [&](int k, int column) { function(kept[k], kept_grads[k], Vec::load(weight + column)); });
      Policy::for_rest(
          end, [&](int column) { function(load(column), Vec::load(grad_row + column), Vec::load(weight + column)); });
    };

    float sums[2] = {0.f, 0.f};  // of x, and of the gradient times the weight
    for_row([&](const Vec& values, const Vec& grads, const Vec& weights) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sums[0] += values[i];
        sums[1] += grads[i] * weights[i];
      }
    });
    row_sums.add_up(sums, turn);
    const float mean = sums[0] / size, mean_grad = sums[1] / size;

    float products[3] = {0.f, 0.f, 0.f};  // of centred values: sums of them, times themselves, times scaled gradients
    for_row([&](const Vec& values, const Vec& grads, const Vec& weights) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float centred = values[i] - mean;
        products[0] += centred;
        products[1] += centred * centred;
        products[2] += grads[i] * weights[i] * centred;
      }
    });
    centred_sums.add_up(products, turn);
    const Moments moments(mean, products[0] / size, products[1] / size, settings.eps);
    // The mean of scaled gradient * normalised x.
    const float projection = (products[2] / size - mean_grad * moments.shift) * moments.inverse_deviation;

    // Stores the gradient of x; and function(i, what it adds to the gradients of weight and bias).
    const auto finish = [&](const Vec& values, const Vec& grads, int column, auto function) {
      const Vec weights = Vec::load(weight + column);
      Vec output;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float normed = moments.normalise(values[i]);
        const float grad = moments.inverse_deviation * (grads[i] * weights[i] - mean_grad - normed * projection);
        output.set(i, grad * settings.input_scale);
        function(i, grads[i] * normed, grads[i]);
      }
      output.store(grad_x_row + rows.offset(column, rows.channels));
    };
    Policy::for_kept(end, [&](int k, int column) {
      finish(kept[k], kept_grads[k], column, [&](int i, float weight_term, float bias_term) {
        grad_weight[k][i] += weight_term;
        grad_bias[k][i] += bias_term;
      });
    });
    Policy::for_rest(end, [&](int column) {
      finish(load(column), Vec::load(grad_row + column), column, [&](int i, float weight_term, float bias_term) {
        weight_partial[column + i] += weight_term;
        bias_partial[column + i] += bias_term;
      });
    });
    ++turn;
  }

  store_partial<Policy>(grad_weight, weight_partial, size);
  __syncthreads();  // the next one has the same shared memory
  store_partial<Policy>(grad_bias, bias_partial, size);
}

}  // namespace vlmfast
