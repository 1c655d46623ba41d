// The pixel shuffle ops as torch sees them; vlmfast/ops/pixel_shuffle.py defines what they compute.
#pragma once

namespace vlmfast {

inline constexpr const char kPixelShuffleSchema[] =
    "pixel_shuffle(Tensor x, SymInt[] grid, SymInt scale=2, str order=\"row\", float input_scale=1.) -> Tensor";

inline constexpr const char kPixelUnshuffleSchema[] =
    "pixel_unshuffle(Tensor x, SymInt[] grid, SymInt scale=2, str order=\"row\", float input_scale=1.) -> Tensor";

inline constexpr const char kPixelShuffleNormSchema[] =
    "pixel_shuffle_norm(Tensor x, Tensor norm_weight, Tensor norm_bias, SymInt[] grid, SymInt scale=2,"
    " str order=\"row\", float input_scale=1., float norm_eps=1.0000000000000001e-05) -> Tensor";

inline constexpr const char kPixelShuffleNormBackwardSchema[] =
    "pixel_shuffle_norm_backward(Tensor grad_output, Tensor x, Tensor norm_weight, SymInt[] grid, SymInt scale=2,"
    " str order=\"row\", float input_scale=1., float norm_eps=1.0000000000000001e-05) -> (Tensor, Tensor, Tensor)";

}  // namespace vlmfast
