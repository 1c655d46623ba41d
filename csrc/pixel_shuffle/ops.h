// The pixel shuffle ops as torch sees them: vlmfast/ops/pixel_shuffle/definition.py defines what they compute.
#pragma once

#define VLMFAST_OPS(OP)                                                                                               \
  OP(pixel_shuffle, "(Tensor x, SymInt[] grid, SymInt scale=2, str order=\"row\", float input_scale=1.) -> Tensor")   \
  OP(pixel_unshuffle, "(Tensor x, SymInt[] grid, SymInt scale=2, str order=\"row\", float input_scale=1.) -> Tensor") \
  OP(pixel_shuffle_norm,                                                                                              \
     "(Tensor x, Tensor norm_weight, Tensor norm_bias, SymInt[] grid, SymInt scale=2, str order=\"row\", "            \
     "float input_scale=1., float norm_eps=1.0000000000000001e-05) -> Tensor")                                        \
  OP(pixel_shuffle_norm_backward,                                                                                     \
     "(Tensor grad_output, Tensor x, Tensor norm_weight, SymInt[] grid, SymInt scale=2, "                             \
     "str order=\"row\", float input_scale=1., float norm_eps=1.0000000000000001e-05)"                                \
     " -> (Tensor, Tensor, Tensor)")
