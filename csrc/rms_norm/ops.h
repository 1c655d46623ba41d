// The arguments and schemas of the RMSNorm ops. vlmfast/ops/rms_norm/definition.py defines what they compute.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

// Which dtypes of the weight a backend supports: that of the rows, or float32 as well.
enum class WeightDtypes { kOfRows, kOfRowsOrFloat32 };

// A call without a weight is treated as "gemma" with a weight of zeros, so rows are multiplied by 1 + 0.
struct RmsNormArguments {
  Leading rows;
  Size hidden = Size("hidden").at_most((int64_t{1} << 30) - 1);  // the CUDA kernels count columns in 32 bits
  FloatDtype dtype;
  View<2> x, residual;
  View<1> weight;
  Variant variant;

  RmsNormArguments(const Tensor& x_tensor, const std::optional<Tensor>& residual_tensor,
                   const std::optional<Tensor>& weight_tensor, Variant order, WeightDtypes taken)
      : x("x", x_tensor, {rows, hidden}, dtype),
        residual("residual", residual_tensor, {rows, hidden}, dtype),
        weight("weight", weight_tensor, {hidden}, FloatDtype()),
        variant(weight_tensor ? order : Variant::kGemma) {
    const bool or_float32 = taken == WeightDtypes::kOfRowsOrFloat32 && dtype != Dtype::kFloat32;
    const Dtype found = weight_dtype();
    STD_TORCH_CHECK(found == dtype || (or_float32 && found == Dtype::kFloat32), "weight must be ", info(dtype).name,
                    ", the dtype of x, ", or_float32 ? "or float32, " : "", "got ", info(found).name);
  }

  Dtype weight_dtype() const { return weight.dtype() == Dtype::kOther ? Dtype(dtype) : weight.dtype(); }
  Dtype output_dtype() const { return variant == Variant::kLlama ? weight_dtype() : Dtype(dtype); }
};

struct RmsNormBackwardArguments : RmsNormArguments {
  View<2> grad_output, grad_residual;

  RmsNormBackwardArguments(const Tensor& grad_output_tensor, const Tensor& x_tensor,
                           const std::optional<Tensor>& weight_tensor, Variant order,
                           const std::optional<Tensor>& grad_residual_tensor, WeightDtypes taken)
      : RmsNormArguments(x_tensor, std::nullopt, weight_tensor, order, taken),
        grad_output("grad_output", grad_output_tensor, {rows, hidden}, output_dtype()),
        grad_residual("grad_residual", grad_residual_tensor, {rows, hidden}, dtype) {}
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                             \
  OP(rms_norm, "(Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\") -> Tensor")                  \
  OP(add_rms_norm,                                                                                                  \
     "(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-6, str variant=\"llama\") -> (Tensor, Tensor)") \
  OP(rms_norm_backward,                                                                                             \
     "(Tensor grad_output, Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\", "                  \
     "Tensor? grad_residual=None, bool weight_grad=True) -> (Tensor, Tensor)")
