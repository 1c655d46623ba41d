// RMSNorm on CUDA: alone, after a residual addition, and backward. vlmfast/ops/rms_norm/definition.py defines what is
// computed.
//
// All three are bound by memory, so each row is read once and stays in registers between the reduction and its use. The
// forward saves nothing for the backward, which computes the inverse rms in the same reduction as the dot product.
#include <optional>
#include <tuple>

#include "common/partial_sums.cuh"
#include "rms_norm/ops.h"

namespace vlmfast {
namespace {

// Loads a vector of the weight, or zeros if there is no weight.
template <typename Vec, typename scalar_t>
__device__ __forceinline__ Vec load_weight(const scalar_t* weight, int column) {
  return weight == nullptr ? Vec{} : Vec::load(weight + column);
}

template <typename scalar_t, typename Policy, bool kHasResidual>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kResident)
    rms_norm_kernel(const scalar_t* __restrict__ x,         // (rows, hidden), x_stride from row to row
                    const scalar_t* __restrict__ residual,  // (rows, hidden), residual_stride from row to row
                    const scalar_t* __restrict__ weight,    // (hidden,), or null
                    scalar_t* __restrict__ y,               // (rows, hidden)
                    scalar_t* __restrict__ new_residual,    // (rows, hidden)
                    int64_t rows, int hidden, int64_t x_stride, int64_t residual_stride, float eps, Variant variant) {
  constexpr int kVec = Policy::kVec;
  using Vec = Vector<scalar_t, kVec>;
  using Held = std::conditional_t<kHasResidual, Vec, Floats<kVec>>;  // two vectors in float32 take too many registers
  __shared__ GroupSum<Policy::kThreadsPerRow, 1> group_sum;

  int turn = 0;
  Policy::for_rows(rows, hidden, [&](int64_t row, int end) {
    const auto load = [&](int column) { return Vec::load(x + row * x_stride + column); };
    const auto load_addends = [&](int column) { return Vec::load(residual + row * residual_stride + column); };
    const auto prepare = [&](Vec values, const Vec& addends) {
      if constexpr (kHasResidual) values.fill([&](int i) { return addends[i] + values[i]; });
      return values.template as<Held>();
    };
    Vec loaded[Policy::kVectors], addends[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int column) {
      loaded[k] = load(column);
      if constexpr (kHasResidual) addends[k] = load_addends(column);
    });
    Held kept[Policy::kVectors];
    Policy::for_kept(end, [&](int k, int) { kept[k] = prepare(loaded[k], addends[k]); });
    const auto load_rest = [&](int column) {
      return prepare(load(column), kHasResidual ? load_addends(column) : Vec());
    };
    float sums[1] = {0.f};
    Policy::for_all(end, kept, load_rest, [&](const Held& values, int column) {
      if constexpr (kHasResidual) values.store(new_residual + row * hidden + column);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[0] += values[i] * values[i];
    });

    group_sum.add_up(sums, turn++);
    const float inverse_rms = rsqrtf(sums[0] / hidden + eps);

    Policy::for_all(end, kept, load_rest, [&](const Held& values, int column) {
      const Vec weights = load_weight<Vec>(weight, column);
      float normed[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) normed[i] = values[i] * inverse_rms;
      round_normed<scalar_t>(variant, normed);
      Vec output;
      output.fill([&](int i) { return weight_scale(variant, weights[i]) * normed[i]; });
      output.store(y + row * hidden + column);
    });
  });
}

// A persistent grid: each block loops over rows and writes its part of the weight's gradient to one row of `partials`.
// Limited (rms_norm_backward_kernel): each element is converted eight times, as registers hold it in half precision; of
// 600 rows of 2048, the two of a block are in flight at once
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
  if (partial != nullptr) clear_rest<Policy>(partial, hidden);

  int turn = 0;
  struct Operands {
    Vec x, grad;
  };
  struct Kept {
    Operands values[Policy::kVectors];
  };
  const auto load = [&](int64_t row, int end) {
    Kept kept;
    Policy::for_kept(end, [&](int k, int column) {
      kept.values[k].x = Vec::load(x + row * x_stride + column);
      kept.values[k].grad = Vec::load(grad_output + row * grad_output_stride + column);
    });
    return kept;
  };
  Policy::for_rows_ahead(rows, hidden, load, [&](int64_t row, int end, const Kept& kept) {
    const scalar_t* const x_row = x + row * x_stride;
    const scalar_t* const grad_row = grad_output + row * grad_output_stride;

    const auto load_rest = [&](int column) {
      return Operands{Vec::load(x_row + column), Vec::load(grad_row + column)};
    };
    float sums[2] = {0.f, 0.f};  // of x * x, and of gradient * weight * x
    Policy::for_all(end, kept.values, load_rest, [&](const Operands& values, int column) {
      const Vec weights = load_weight<Vec>(weight, column);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float value = values.x[i];
        sums[0] += value * value;
        sums[1] += values.grad[i] * weight_scale(variant, weights[i]) * value;
      }
    });
    group_sum.add_up(sums, turn++);
    const float inverse_rms = rsqrtf(sums[0] / hidden + eps);
    const float projection = sums[1] * inverse_rms / hidden;  // the mean of gradient * weight * normalised x

    // Stores the gradient of x, and accumulates that of the weight.
    const auto finish = [&](const Operands& values, int column, float* weight_sums) {
      const Vec weights = load_weight<Vec>(weight, column);
      Vec residuals, output;
      if (grad_residual != nullptr) residuals = Vec::load(grad_residual + row * grad_residual_stride + column);
      float normed[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) normed[i] = values.x[i] * inverse_rms;
      output.fill([&](int i) {
        const float scaled = values.grad[i] * weight_scale(variant, weights[i]);
        const float grad = inverse_rms * (scaled - normed[i] * projection);
        return grad_residual != nullptr ? grad + residuals[i] : grad;
      });
      output.store(grad_x + row * hidden + column);
      if (weight_sums == nullptr) return;
      round_normed<scalar_t>(variant, normed);
#pragma unroll
      for (int i = 0; i < kVec; ++i) weight_sums[i] += values.grad[i] * normed[i];
    };
    Policy::for_kept(end, [&](int k, int column) { finish(kept.values[k], column, grad_weight[k]); });
    Policy::for_rest(
        end, [&](int column) { finish(load_rest(column), column, partial == nullptr ? nullptr : partial + column); });
  });

  if (partial != nullptr) store_partial<Policy>(grad_weight, partial, hidden);
}

// Launches the forward, which writes y and, if there is a residual, the new residual.
void launch_forward(const Tensor& x_tensor, const std::optional<Tensor>& residual_tensor,
                    const std::optional<Tensor>& weight_tensor, double eps, Variant variant, const Tensor& y,
                    const std::optional<Tensor>& new_residual) {
  const RmsNormArguments args(x_tensor, residual_tensor, weight_tensor, variant, WeightDtypes::kOfRows);
  if (args.x.numel() == 0) return;
  const DeviceScope scope(x_tensor);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const auto kernel =
        args.residual ? rms_norm_kernel<scalar_t, Policy, true> : rms_norm_kernel<scalar_t, Policy, false>;
    const auto x_rows = scope.input<scalar_t>(args.x), residual_rows = scope.input<scalar_t>(args.residual);
    launch_blocks(scope, kernel, Policy::blocks(args.rows, kMaxBlocks), Policy::kThreads, 0, x_rows.data,
                  residual_rows.data, scope.input<scalar_t>(args.weight).data, scope.output<scalar_t>(y),
                  args.residual ? scope.output<scalar_t>(*new_residual) : nullptr, args.rows, args.hidden,
                  x_rows.strides[0], residual_rows.strides[0], eps, args.variant);
  };
  const bool fit = vectors_fit(kVectorBytes, args.x, args.residual, args.weight);
  with_hidden_row_policy(args.dtype, args.hidden, fit, run);
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, Variant variant) {
  Tensor y = allocate_like(x);
  launch_forward(x, std::nullopt, weight, eps, variant, y, std::nullopt);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, Variant variant) {
  Tensor y = allocate_like(x), new_residual = allocate_like(x);
  launch_forward(x, residual, weight, eps, variant, y, new_residual);
  return {y, new_residual};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& x_tensor,
                                             const std::optional<Tensor>& weight_tensor, double eps, Variant variant,
                                             const std::optional<Tensor>& grad_residual, bool weight_grad) {
  const RmsNormBackwardArguments args(grad_output, x_tensor, weight_tensor, variant, grad_residual,
                                      WeightDtypes::kOfRows);
  const int64_t rows = args.rows, hidden = args.hidden;
  weight_grad = weight_grad && weight_tensor;
  Tensor grad_x = allocate_like(x_tensor), grad_weight = allocate({weight_grad ? hidden : 0}, x_tensor, args.dtype);
  if (hidden == 0 || (rows == 0 && !weight_grad)) return {grad_x, grad_weight};

  const DeviceScope scope(x_tensor);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const int64_t blocks = Policy::persistent_blocks(rows, scope.multiprocessors());
    std::optional<Tensor> partials;
    if (weight_grad) partials = float_buffer(blocks * hidden, x_tensor);
    float* const partials_data = weight_grad ? scope.output<float>(*partials) : nullptr;
    const auto grads = scope.input<scalar_t>(args.grad_output), x_rows = scope.input<scalar_t>(args.x);
    const auto residuals = scope.input<scalar_t>(args.grad_residual);
    if (blocks > 0) {
      check_cuda(launch(rms_norm_backward_kernel<scalar_t, Policy>, dim3(blocks), dim3(Policy::kThreads), 0,
                        scope.stream(), grads.data, x_rows.data, scope.input<scalar_t>(args.weight).data,
                        residuals.data, scope.output<scalar_t>(grad_x), partials_data, rows, hidden, grads.strides[0],
                        x_rows.strides[0], residuals.strides[0], eps, args.variant));
    }
    if (weight_grad) {
      launch_sum_partials(scope, partials_data, blocks, hidden, scope.output<scalar_t>(grad_weight));
    }
  };
  const bool fit = vectors_fit(kVectorBytes, args.grad_output, args.x, args.weight, args.grad_residual);
  with_hidden_row_policy(args.dtype, args.hidden, fit, run);
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
