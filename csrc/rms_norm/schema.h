// The RMSNorm ops as torch sees them; vlmfast/ops/rms_norm.py defines what they compute.
#pragma once

namespace vlmfast {

inline constexpr const char kRmsNormSchema[] =
    "rms_norm(Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\") -> Tensor";

inline constexpr const char kAddRmsNormSchema[] =
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-6, str variant=\"llama\")"
    " -> (Tensor, Tensor)";

inline constexpr const char kRmsNormBackwardSchema[] =
    "rms_norm_backward(Tensor grad_output, Tensor x, Tensor? weight=None, float eps=1e-6, str variant=\"llama\","
    " Tensor? grad_residual=None, bool weight_grad=True) -> (Tensor, Tensor)";

}  // namespace vlmfast
