// RMSNorm on the CPU: the ops' arguments, outputs and threads. The arithmetic is in rms_norm_kernels.cpp.
#include "common/cpu.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "common/common.h"
#include "rms_norm/cpu_kernels.h"
#include "rms_norm/ops.h"

namespace vlmfast {
namespace {

const RmsNormKernels& kernels() {
  static const RmsNormKernels table = at_cpu_level([](auto level) { return rms_norm_kernels<level>(); });
  return table;
}

Tensor output_like(const Tensor& x) { return allocate_output(x.sizes(), x); }

// What rows are multiplied by, and how: without a weight by ones, as "olmo" does it.
struct Weight {
  std::optional<Rows> rows;
  std::unique_ptr<float[]> ones;  // or as many elements of 16 bits
  Variant variant;

  Weight(const std::optional<Tensor>& tensor, const Rows& x, Variant order)
      : rows(checked_weight(tensor, x)), variant(rows ? order : Variant::kOlmo) {
    if (rows) return;
    ones.reset(new float[x.size]);
    const Dtype dtype = dtype_of(x.tensor);
    if (dtype == Dtype::kFloat32) {
      std::fill_n(ones.get(), x.size, 1.0f);
    } else {
      std::fill_n(reinterpret_cast<uint16_t*>(ones.get()), x.size, dtype == Dtype::kFloat16 ? 0x3c00 : 0x3f80);
    }
  }

  const void* data() const { return rows ? rows->data() : ones.get(); }
};

Tensor forward(const Rows& x, const Rows* residual, const Tensor* new_residual, const std::optional<Tensor>& weight,
               double eps, Variant variant) {
  const Weight w(weight, x, variant);
  Tensor y = output_like(x.tensor);
  const RmsNormForward args{dtype_of(x.tensor),
                            w.variant,
                            static_cast<float>(eps),
                            x.size,
                            x.data(),
                            residual != nullptr ? residual->data() : nullptr,
                            w.data(),
                            y.mutable_data_ptr(),
                            new_residual != nullptr ? new_residual->mutable_data_ptr() : nullptr,
                            x.row_stride,
                            residual != nullptr ? residual->row_stride : 0};
  parallel_rows(x.count, row_ranges(x.count, x.size),
                [&](int64_t begin, int64_t end, int64_t) { kernels().forward(args, begin, end); });
  return y;
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, Variant variant) {
  return forward(Rows(x), nullptr, nullptr, weight, eps, variant);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, Variant variant) {
  const Rows x_rows(x), residual_rows(residual);
  check_twin("residual", residual_rows, x_rows);
  Tensor new_residual = output_like(x);
  Tensor y = forward(x_rows, &residual_rows, &new_residual, weight, eps, variant);
  return {std::move(y), std::move(new_residual)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& x,
                                             const std::optional<Tensor>& weight, double eps, Variant variant,
                                             const std::optional<Tensor>& grad_residual, bool weight_grad) {
  const Rows x_rows(x), grad_rows(grad_output);
  const Weight w(weight, x_rows, variant);
  weight_grad = weight_grad && w.rows;
  check_twin("grad_output", grad_rows, x_rows);
  std::optional<Rows> residual_rows;
  if (grad_residual.has_value()) check_twin("grad_residual", residual_rows.emplace(*grad_residual), x_rows);

  Tensor grad_x = output_like(x);
  const int64_t grad_weight_size = weight_grad ? x_rows.size : 0;
  Tensor grad_weight = allocate(&grad_weight_size, 1, weight ? *weight : x);
  const RmsNormBackward args{dtype_of(x),
                             w.variant,
                             static_cast<float>(eps),
                             x_rows.size,
                             grad_rows.data(),
                             x_rows.data(),
                             w.data(),
                             residual_rows ? residual_rows->data() : nullptr,
                             grad_x.mutable_data_ptr(),
                             grad_rows.row_stride,
                             x_rows.row_stride,
                             residual_rows ? residual_rows->row_stride : 0};

  const int64_t ranges = row_ranges(x_rows.count, x_rows.size);
  const int64_t partial_size = weight_grad ? vlmfast::partial_size(x_rows.size) : 0;
  const std::unique_ptr<float[]> partials(new float[ranges * partial_size]());
  parallel_rows(x_rows.count, ranges, [&](int64_t begin, int64_t end, int64_t range) {
    kernels().backward(args, begin, end, weight_grad ? &partials[range * partial_size] : nullptr);
  });
  kernels().sum_partials(args.dtype, grad_weight_size, partials.get(), ranges, grad_weight.mutable_data_ptr());
  return {std::move(grad_x), std::move(grad_weight)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
