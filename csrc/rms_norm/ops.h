// The RMSNorm ops as torch sees them: vlmfast/ops/rms_norm/definition.py defines what they compute.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

// The arguments that all ops share. Without a weight rows are multiplied by 1 + 0, as "gemma" does it.
struct RmsNormArguments {
  Leading rows;
  Size hidden = Size("hidden").at_most((int64_t{1} << 30) - 1);  // columns are counted in 32 bits
  FloatDtype dtype;
  View<2> x;
  View<1> weight;
  Variant variant;

  RmsNormArguments(const Tensor& x_tensor, const std::optional<Tensor>& weight_tensor, Variant order)
      : x("x", x_tensor, {rows, hidden}, dtype),
        weight("weight", weight_tensor, {hidden}, dtype),
        variant(weight_tensor ? order : Variant::kGemma) {}
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                             \
  OP(rms_norm, "(Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\") -> Tensor")                  \
  OP(add_rms_norm,                                                                                                  \
     "(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-6, str variant=\"llama\") -> (Tensor, Tensor)") \
  OP(rms_norm_backward,                                                                                             \
     "(Tensor grad_output, Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\", "                  \
     "Tensor? grad_residual=None, bool weight_grad=True) -> (Tensor, Tensor)")
