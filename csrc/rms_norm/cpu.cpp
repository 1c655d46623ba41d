// RMSNorm on the CPU: the ops' arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <memory>
#include <optional>
#include <tuple>

#include "rms_norm/cpu_kernels.h"
#include "rms_norm/ops.h"

namespace vlmfast {
namespace {

// The arguments of a call as the kernels take them, which know neither variants nor calls without a
// weight.
struct NormCall : RmsNormArguments {
  std::unique_ptr<float[]> zeros;  // of any dtype
  const void* weight_data;
  float weight_offset;
  int rounded;

  NormCall(const Tensor& x_tensor, const std::optional<Tensor>& weight_tensor, Variant order)
      : RmsNormArguments(x_tensor, weight_tensor, order),
        zeros(weight_tensor ? nullptr : new float[hidden]()),
        weight_data(weight_tensor ? weight.data() : zeros.get()),
        weight_offset(variant == Variant::kGemma ? 1.0f : -0.0f),
        rounded(variant == Variant::kLlama ? 1 : 0) {}
};

Tensor forward(const NormCall& call, const Tensor& x, const View<2>* residual, void* new_residual, double eps) {
  Tensor y = allocate_output(x.sizes(), x, call.dtype);
  const RmsNormForward args{static_cast<float>(eps),
                            call.weight_offset,
                            call.hidden,
                            call.x.data(),
                            residual != nullptr ? residual->data() : nullptr,
                            call.weight_data,
                            y.mutable_data_ptr(),
                            new_residual,
                            call.x.stride(0),
                            residual != nullptr ? residual->stride(0) : 0};
  const auto kernel = kernels<RmsNormKernels>().forward[residual != nullptr ? 1 : 0][call.rounded][call.dtype];
  parallel_rows(call.rows, row_ranges(call.rows, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { kernel(args, begin, end); });
  return y;
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, Variant variant) {
  return forward(NormCall(x, weight, variant), x, nullptr, nullptr, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual_tensor,
                                        const std::optional<Tensor>& weight, double eps, Variant variant) {
  NormCall call(x, weight, variant);
  const View residual("residual", residual_tensor, {call.rows, call.hidden}, call.dtype);
  Tensor new_residual = allocate_output(x.sizes(), x, call.dtype);
  Tensor y = forward(call, x, &residual, new_residual.mutable_data_ptr(), eps);
  return {std::move(y), std::move(new_residual)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& x,
                                             const std::optional<Tensor>& weight, double eps, Variant variant,
                                             const std::optional<Tensor>& grad_residual, bool weight_grad) {
  NormCall call(x, weight, variant);
  const View grads("grad_output", grad_output, {call.rows, call.hidden}, call.dtype);
  const View residual_grads("grad_residual", grad_residual, {call.rows, call.hidden}, call.dtype);
  Tensor grad_x = allocate_output(x.sizes(), x, call.dtype);
  weight_grad = weight_grad && weight.has_value();
  const int64_t grad_weight_size = weight_grad ? int64_t{call.hidden} : 0;
  Tensor grad_weight = allocate({grad_weight_size}, x, call.dtype);
  const RmsNormBackward args{static_cast<float>(eps),
                             call.weight_offset,
                             call.hidden,
                             grads.data(),
                             call.x.data(),
                             call.weight_data,
                             residual_grads.data(),
                             grad_x.mutable_data_ptr(),
                             grads.stride(0),
                             call.x.stride(0),
                             residual_grads.stride(0)};

  const auto& table = kernels<RmsNormKernels>();
  const int64_t ranges = row_ranges(call.rows, call.hidden), partial = weight_grad ? partial_size(call.hidden) : 0;
  const std::unique_ptr<float[]> partials(new float[ranges * partial]());
  const auto backward = table.backward[call.rounded][call.dtype];
  parallel_rows(call.rows, ranges, [&](int64_t begin, int64_t end, int64_t range) {
    backward(args, begin, end, weight_grad ? &partials[range * partial] : nullptr);
  });
  table.sum_partials[call.dtype](grad_weight_size, partials.get(), ranges, grad_weight.mutable_data_ptr());
  return {std::move(grad_x), std::move(grad_weight)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
