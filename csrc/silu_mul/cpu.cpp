// The gated activation on the CPU: the ops' arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <tuple>

#include "silu_mul/cpu_kernels.h"
#include "silu_mul/ops.h"

namespace vlmfast {
namespace {

Tensor silu_mul(const Tensor& gate, const Tensor& up, Activation activation) {
  const SiluMulArguments call(gate, up);
  Tensor y = allocate_output(gate.sizes(), gate, call.dtype);
  const SiluMulForward args{call.hidden,          call.gate.data(),    call.up.data(),
                            y.mutable_data_ptr(), call.gate.stride(0), call.up.stride(0)};
  const auto forward = kernels<SiluMulKernels>().forward[static_cast<int>(activation)][call.dtype];
  parallel_rows(call.rows, row_ranges(call.rows, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { forward(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad_output, const Tensor& gate, const Tensor& up,
                                             Activation activation) {
  const SiluMulArguments call(gate, up, grad_output);
  Tensor grad_gate = allocate_output(gate.sizes(), gate, call.dtype);
  Tensor grad_up = allocate_output(gate.sizes(), gate, call.dtype);
  const SiluMulBackward args{call.hidden,
                             call.grad_output.data(),
                             call.gate.data(),
                             call.up.data(),
                             grad_gate.mutable_data_ptr(),
                             grad_up.mutable_data_ptr(),
                             call.grad_output.stride(0),
                             call.gate.stride(0),
                             call.up.stride(0)};
  const auto backward = kernels<SiluMulKernels>().backward[static_cast<int>(activation)][call.dtype];
  parallel_rows(call.rows, row_ranges(call.rows, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { backward(args, begin, end); });
  return {std::move(grad_gate), std::move(grad_up)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
