// The arguments and schemas of the gated activation. vlmfast/ops/silu_mul/definition.py defines what is computed.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

struct SiluMulArguments {
  Leading rows;
  Size hidden = Size("hidden").at_most((int64_t{1} << 30) - 1);  // the CUDA kernels count columns in 32 bits
  FloatDtype dtype;
  View<2> gate, up, grad_output;

  SiluMulArguments(const Tensor& gate_tensor, const Tensor& up_tensor,
                   const std::optional<Tensor>& grad_output_tensor = std::nullopt)
      : gate("gate", gate_tensor, {rows, hidden}, dtype),
        up("up", up_tensor, {rows, hidden}, dtype),
        grad_output("grad_output", grad_output_tensor, {rows, hidden}, dtype) {}
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                       \
  OP(silu_mul, "(Tensor gate, Tensor up, str activation=\"silu\") -> Tensor") \
  OP(silu_mul_backward, "(Tensor grad_output, Tensor gate, Tensor up, str activation=\"silu\") -> (Tensor, Tensor)")
