// RMSNorm on the CPU: the ops' arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <memory>
#include <optional>
#include <tuple>

#include "rms_norm/cpu_kernels.h"
#include "rms_norm/ops.h"

namespace vlmfast {
namespace {

// The weight of a call in the form that the kernels take, which know neither variants nor missing weights.
struct KernelWeight {
  std::unique_ptr<float[]> zeros;  // zeros in every dtype
  const void* data;
  float offset;
  int wide, rounded;

  explicit KernelWeight(const RmsNormArguments& call)
      : zeros(call.weight ? nullptr : new float[call.hidden]()),
        data(call.weight ? call.weight.data() : zeros.get()),
        offset(call.variant == Variant::kGemma ? 1.0f : -0.0f),
        wide(call.weight.dtype() == Dtype::kFloat32 ? 1 : 0),
        rounded(call.variant == Variant::kLlama ? 1 : 0) {}
};

Tensor forward(const RmsNormArguments& call, const Tensor& x, void* new_residual, double eps) {
  const KernelWeight weight(call);
  Tensor y = allocate_output(x.sizes(), x, call.output_dtype());
  const RmsNormForward args{static_cast<float>(eps), weight.offset,        call.hidden,
                            call.x.data(),           call.residual.data(), weight.data,
                            y.mutable_data_ptr(),    new_residual,         call.x.stride(0),
                            call.residual.stride(0)};
  const auto kernel = kernels<RmsNormKernels>().forward[weight.wide][call.residual ? 1 : 0][weight.rounded][call.dtype];
  parallel_rows(call.rows, row_ranges(call.rows, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { kernel(args, begin, end); });
  return y;
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, Variant variant) {
  return forward(RmsNormArguments(x, std::nullopt, weight, variant, WeightDtypes::kOfRowsOrFloat32), x, nullptr, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                        double eps, Variant variant) {
  const RmsNormArguments call(x, residual, weight, variant, WeightDtypes::kOfRowsOrFloat32);
  Tensor new_residual = allocate_output(x.sizes(), x, call.dtype);
  Tensor y = forward(call, x, new_residual.mutable_data_ptr(), eps);
  return {std::move(y), std::move(new_residual)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& x,
                                             const std::optional<Tensor>& weight, double eps, Variant variant,
                                             const std::optional<Tensor>& grad_residual, bool weight_grad) {
  const RmsNormBackwardArguments call(grad_output, x, weight, variant, grad_residual, WeightDtypes::kOfRowsOrFloat32);
  const KernelWeight kernel_weight(call);
  Tensor grad_x = allocate_output(x.sizes(), x, call.dtype);
  weight_grad = weight_grad && weight.has_value();
  const int64_t grad_weight_size = weight_grad ? int64_t{call.hidden} : 0;
  Tensor grad_weight = allocate({grad_weight_size}, x, call.weight_dtype());
  const RmsNormBackward args{static_cast<float>(eps),
                             kernel_weight.offset,
                             call.hidden,
                             call.grad_output.data(),
                             call.x.data(),
                             kernel_weight.data,
                             call.grad_residual.data(),
                             grad_x.mutable_data_ptr(),
                             call.grad_output.stride(0),
                             call.x.stride(0),
                             call.grad_residual.stride(0)};

  const auto& table = kernels<RmsNormKernels>();
  const int64_t ranges = row_ranges(call.rows, call.hidden), partial = weight_grad ? partial_size(call.hidden) : 0;
  const std::unique_ptr<float[]> partials(new float[ranges * partial]());
  const auto backward = table.backward[kernel_weight.wide][kernel_weight.rounded][call.dtype];
  parallel_rows(call.rows, ranges, [&](int64_t begin, int64_t end, int64_t range) {
    backward(args, begin, end, weight_grad ? &partials[range * partial] : nullptr);
  });
  table.sum_partials[call.weight_dtype()](grad_weight_size, partials.get(), ranges, grad_weight.mutable_data_ptr());
  return {std::move(grad_x), std::move(grad_weight)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
