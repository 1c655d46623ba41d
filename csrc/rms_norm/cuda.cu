// RMSNorm on CUDA: alone, after a residual addition, and backward. vlmfast/ops/rms_norm.py defines what is computed.
//
// All three are bound by memory. For R rows of D elements of s bytes they move, besides the weight,
//   rms_norm            2 R D s      x in, y out
//   add_rms_norm        4 R D s      x and the residual in, y and the new residual out
//   rms_norm_backward   3 R D s      the gradient and x in, grad_x out; R D s more with grad_residual,
//                                    8 B D more for the float32 partial sums of B persistent blocks
// so a row is read once and stays in registers between the reduction and its use. The forward stores nothing for the
// backward, where the inverse rms comes out of the same reduction as the dot product.
#include <optional>
#include <tuple>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "common/partial_sums.cuh"
#include "common/row_policy.cuh"
#include "rms_norm/schema.h"

namespace vlmfast {
namespace {

// ---- kernels ----

// The variant is an argument of the kernels: a uniform branch costs less than twice as many of them.
__device__ __forceinline__ float weight_scale(Variant variant, float weight) {
  return variant == Variant::kGemma ? 1.f + weight : weight;
}

// Ones without a weight.
template <int kVec, typename scalar_t>
__device__ __forceinline__ Vector<scalar_t, kVec> load_weight(const scalar_t* weight, int column) {
  if (weight != nullptr) return Vector<scalar_t, kVec>::load(weight + column);
  Vector<scalar_t, kVec> ones;
#pragma unroll
  for (int i = 0; i < kVec; ++i) ones.set(i, 1.f);
  return ones;
}

// The normalised value as it meets the weight: "llama" has rounded it.
template <typename scalar_t>
__device__ __forceinline__ float weighted_value(Variant variant, float normed) {
  return variant == Variant::kLlama ? round_to<scalar_t>(normed) : normed;
}

template <typename scalar_t, typename Policy, bool kHasResidual>
__global__ void __launch_bounds__(Policy::kThreads)
    rms_norm_kernel(const scalar_t* __restrict__ x,         // (rows, hidden), x_stride from row to row
                    const scalar_t* __restrict__ residual,  // (rows, hidden), residual_stride from row to row
                    const scalar_t* __restrict__ weight,    // (hidden,), or null
                    scalar_t* __restrict__ y,               // (rows, hidden)
                    scalar_t* __restrict__ new_residual,    // (rows, hidden)
                    int64_t rows, int hidden, int64_t x_stride, int64_t residual_stride, float eps, Variant variant) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> group_sum;

  int turn = 0;
  const int64_t row_step = int64_t{gridDim.x} * Policy::kRowsPerBlock;
  for (int64_t block_row = int64_t{blockIdx.x} * Policy::kRowsPerBlock; block_row < rows; block_row += row_step) {
    const int64_t row = block_row + Policy::group();
    const int end = row < rows ? hidden : 0;  // a group past the last row only takes part in the shuffles

    const scalar_t* const x_row = x + row * x_stride;
    const auto load = [&](int column) {
      Vec values = Vec::load(x_row + column);
      if constexpr (kHasResidual) {
        const Vec addends = Vec::load(residual + row * residual_stride + column);
#pragma unroll
        for (int i = 0; i < kVec; ++i) values.set(i, addends[i] + values[i]);
      }
      return values;
    };
    float sums[1] = {0.f};
    const auto accumulate = [&](const Vec& values, int column) {
      if constexpr (kHasResidual) values.store(new_residual + row * hidden + column);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[0] += values[i] * values[i];
    };
    Vec kept[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) { kept[k] = load(column); });
    Policy::for_kept(end, [&](int k, int column) { accumulate(kept[k], column); });
    Policy::for_rest(end, [&](int column) { accumulate(load(column), column); });

    group_sum.add_up(sums, turn++);
    const float inverse_rms = rsqrtf(sums[0] / hidden + eps);

    const auto normalise = [&](const Vec& values, int column) {
      const Vec weights = load_weight<kVec>(weight, column);
      Vec output;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        output.set(i, weight_scale(variant, weights[i]) * weighted_value<scalar_t>(variant, values[i] * inverse_rms));
      }
      output.store(y + row * hidden + column);
    };
    Policy::for_kept(end, [&](int k, int column) { normalise(kept[k], column); });
    Policy::for_rest(end, [&](int column) { normalise(load(column), column); });
  }
}

// A persistent grid: each block walks over rows and leaves its part of the weight's gradient in one row of `partials`.
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerMultiprocessor)
    rms_norm_backward_kernel(const scalar_t* __restrict__ grad_output,    // (rows, hidden)
                             const scalar_t* __restrict__ x,              // (rows, hidden)
                             const scalar_t* __restrict__ weight,         // (hidden,), or null
                             const scalar_t* __restrict__ grad_residual,  // (rows, hidden), or null
                             scalar_t* __restrict__ grad_x,               // (rows, hidden), contiguous
                             float* __restrict__ partials,                // (gridDim.x, hidden), or null
                             int64_t rows, int hidden, int64_t grad_output_stride, int64_t x_stride,
                             int64_t grad_residual_stride, float eps, Variant variant) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  __shared__ GroupSum<Policy::kThreadsPerRow, 2> group_sum;
  float* const partial = partials == nullptr ? nullptr : partials + int64_t{blockIdx.x} * hidden;
  float grad_weight[Policy::kVectors][kVec] = {};

  int turn = 0;
  const int64_t row_step = int64_t{gridDim.x} * Policy::kRowsPerBlock;
  for (int64_t block_row = int64_t{blockIdx.x} * Policy::kRowsPerBlock; block_row < rows; block_row += row_step) {
    const int64_t row = block_row + Policy::group();
    const int end = row < rows ? hidden : 0;  // a group past the last row only takes part in the shuffles
    const scalar_t* const x_row = x + row * x_stride;
    const scalar_t* const grad_row = grad_output + row * grad_output_stride;

    float sums[2] = {0.f, 0.f};  // of x * x, and of scaled gradient * x
    const auto accumulate = [&](const Vec& values, const Vec& grads, const Vec& scales) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sums[0] += values[i] * values[i];
        sums[1] += grads[i] * weight_scale(variant, scales[i]) * values[i];
      }
    };
    Vec values[Policy::kVectors], grads[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) {
      values[k] = Vec::load(x_row + column);
      grads[k] = Vec::load(grad_row + column);
    });
    Policy::for_kept(end,
                     [&](int k, int column) { accumulate(values[k], grads[k], load_weight<kVec>(weight, column)); });
    Policy::for_rest(end, [&](int column) {
      accumulate(Vec::load(x_row + column), Vec::load(grad_row + column), load_weight<kVec>(weight, column));
    });

    group_sum.add_up(sums, turn);
    const float inverse_rms = rsqrtf(sums[0] / hidden + eps);
    const float projection = sums[1] * inverse_rms / hidden;  // mean of scaled gradient * normalised x

    const auto finish = [&](const Vec& values, const Vec& grads, const Vec& scales, int column) {
      Vec residuals, output;
      if (grad_residual != nullptr) residuals = Vec::load(grad_residual + row * grad_residual_stride + column);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float scaled = grads[i] * weight_scale(variant, scales[i]);
        const float grad = inverse_rms * (scaled - values[i] * inverse_rms * projection);
        output.set(i, grad_residual != nullptr ? grad + residuals[i] : grad);
      }
      output.store(grad_x + row * hidden + column);
    };
    const auto weight_term = [&](float value, float grad) {
      return grad * weighted_value<scalar_t>(variant, value * inverse_rms);
    };
    Policy::for_kept(end, [&](int k, int column) {
      finish(values[k], grads[k], load_weight<kVec>(weight, column), column);
#pragma unroll
      for (int i = 0; i < kVec; ++i) grad_weight[k][i] += weight_term(values[k][i], grads[k][i]);
    });
    Policy::for_rest(end, [&](int column) {
      const Vec value = Vec::load(x_row + column), grad = Vec::load(grad_row + column);
      finish(value, grad, load_weight<kVec>(weight, column), column);
      if (partial == nullptr) return;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {  // too long for registers: this thread alone owns these columns of the partials
        const float before = turn == 0 ? 0.f : partial[column + i];
        partial[column + i] = before + weight_term(value[i], grad[i]);
      }
    });
    ++turn;
  }

  if (partial != nullptr) store_partial<Policy>(grad_weight, partial, hidden);
}

// ---- launchers ----

void check_size(const Rows& x) {  // columns are counted in 32 bits
  STD_TORCH_CHECK(x.size < int64_t{1} << 30, "the last size of x must be below 2^30, got ", x.size);
}

// Writes y, and the new residual where there is a residual.
void launch_forward(const Rows& x, const std::optional<Rows>& residual, const std::optional<Tensor>& weight, double eps,
                    Variant variant, const Tensor& y, const std::optional<Tensor>& new_residual) {
  check_size(x);
  const std::optional<Rows> weights = checked_weight(weight, x);
  if (!weights) variant = Variant::kOlmo;
  if (residual) check_twin("residual", *residual, x);
  if (x.count * x.size == 0) return;
  const DeviceScope scope(x.tensor);
  with_dtype(dtype_of(x.tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto x_rows = scope.input<scalar_t>(x);
    const auto weight_row = weights ? scope.input<scalar_t>(*weights) : RowPointer<scalar_t>();
    const auto residual_rows = residual ? scope.input<scalar_t>(*residual) : RowPointer<scalar_t>();
    const auto y_data = scope.output<scalar_t>(y);
    const auto new_residual_data = residual ? scope.output<scalar_t>(*new_residual) : nullptr;
    with_row_policy<scalar_t>(x.size, {x_rows, residual_rows, weight_row}, [&](auto policy) {
      using Policy = decltype(policy);
      const auto kernel = residual ? rms_norm_kernel<scalar_t, Policy, true> : rms_norm_kernel<scalar_t, Policy, false>;
      check_cuda(launch(kernel, dim3(row_blocks<Policy>(x.count, kMaxBlocks)), dim3(Policy::kThreads), 0,
                        scope.stream(), x_rows.data, residual_rows.data, weight_row.data, y_data, new_residual_data,
                        x.count, x.size, x_rows.stride, residual_rows.stride, eps, variant));
    });
  });
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, Variant variant) {
  Tensor y = allocate_like(x);
  launch_forward(Rows(x), std::nullopt, weight, eps, variant, y, std::nullopt);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, Variant variant) {
  Tensor y = allocate_like(x), new_residual = allocate_like(x);
  launch_forward(Rows(x), Rows(residual), weight, eps, variant, y, new_residual);
  return {y, new_residual};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output_tensor, const Tensor& x_tensor,
                                             const std::optional<Tensor>& weight, double eps, Variant variant,
                                             const std::optional<Tensor>& grad_residual_tensor, bool weight_grad) {
  const Rows x(x_tensor), grad_output(grad_output_tensor);
  std::optional<Rows> grad_residual;
  check_size(x);
  const std::optional<Rows> weights = checked_weight(weight, x);
  if (!weights) variant = Variant::kOlmo, weight_grad = false;
  check_twin("grad_output", grad_output, x);
  if (grad_residual_tensor) {
    grad_residual.emplace(*grad_residual_tensor);
    check_twin("grad_residual", *grad_residual, x);
  }
  const int64_t weight_size = weight_grad ? x.size : 0;
  Tensor grad_x = allocate_like(x_tensor), grad_weight = allocate(&weight_size, 1, weight ? *weight : x_tensor);
  if (x.size == 0 || (x.count == 0 && !weight_grad)) return {grad_x, grad_weight};

  const DeviceScope scope(x_tensor);
  with_dtype(dtype_of(x_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto grad_rows = scope.input<scalar_t>(grad_output), x_rows = scope.input<scalar_t>(x);
    const auto weight_row = weights ? scope.input<scalar_t>(*weights) : RowPointer<scalar_t>();
    const auto residual_rows = grad_residual ? scope.input<scalar_t>(*grad_residual) : RowPointer<scalar_t>();
    with_row_policy<scalar_t>(x.size, {grad_rows, x_rows, weight_row, residual_rows}, [&](auto policy) {
      using Policy = decltype(policy);
      const int64_t resident = int64_t{scope.multiprocessors()} * Policy::kBlocksPerMultiprocessor;
      const int64_t blocks = row_blocks<Policy>(x.count, resident);
      std::optional<Tensor> partials;
      if (weight_grad) partials = float_buffer(blocks * x.size, x_tensor);
      float* const partials_data = weight_grad ? scope.output<float>(*partials) : nullptr;
      if (blocks > 0) {
        check_cuda(launch(rms_norm_backward_kernel<scalar_t, Policy>, dim3(blocks), dim3(Policy::kThreads), 0,
                          scope.stream(), grad_rows.data, x_rows.data, weight_row.data, residual_rows.data,
                          scope.output<scalar_t>(grad_x), partials_data, x.count, x.size, grad_rows.stride,
                          x_rows.stride, residual_rows.stride, eps, variant));
      }
      if (weight_grad) {
        launch_sum_partials(scope, partials_data, blocks, x.size, scope.output<scalar_t>(grad_weight));
      }
    });
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace vlmfast

#ifdef VLMFAST_EMULATED  // elsewhere rms_norm.cpp defines them
STABLE_TORCH_LIBRARY_FRAGMENT(VLMFAST_CUDA_LIBRARY, m) {
  m.def(vlmfast::kRmsNormSchema);
  m.def(vlmfast::kAddRmsNormSchema);
  m.def(vlmfast::kRmsNormBackwardSchema);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(VLMFAST_CUDA_LIBRARY, VLMFAST_CUDA_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&vlmfast::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&vlmfast::add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&vlmfast::rms_norm_backward));
}
