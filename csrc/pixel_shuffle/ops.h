// The arguments and schemas of the pixel shuffle ops. vlmfast/ops/pixel_shuffle/definition.py defines what they
// compute.
#pragma once

#include <algorithm>
#include <vector>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

// The grid of patches of an image, and how they are joined into tokens.
struct PatchGrid {
  int64_t height, width, scale;
  TokenOrder order;

  PatchGrid(const std::vector<int64_t>& grid, int64_t scale, TokenOrder order) : scale(scale), order(order) {
    STD_TORCH_CHECK(grid.size() == 2, "grid must be (height, width), got ", grid.size(), " numbers");
    height = grid[0];
    width = grid[1];
    check_within("scale", scale, 1, 46340);  // the largest number whose square is within kMostInt
    STD_TORCH_CHECK(height >= 0 && width >= 0 && height % scale == 0 && width % scale == 0,
                    "grid must be divisible by scale, ", scale, ", got (", height, ", ", width, ")");
    STD_TORCH_CHECK(width == 0 || height <= kMostInt / width, "grid must have fewer than 2^31 patches");
  }

  int64_t patches() const { return height * width; }
  int64_t per_token() const { return scale * scale; }
  int64_t tokens() const { return patches() / per_token(); }
};

// What all ops share.
struct GridArguments {
  PatchGrid grid;
  Size batch, patches, tokens;
  FloatDtype dtype;

  explicit GridArguments(const PatchGrid& patch_grid)
      : grid(patch_grid),
        batch(Size("batch").at_most(kMostInt / std::max<int64_t>(grid.patches(), 1))),
        patches("patches", grid.patches()),
        tokens("tokens", grid.tokens()) {}
};

struct ShuffleArguments : GridArguments {
  Size channels{"channels"};
  View<3> x;
  Size hidden;

  ShuffleArguments(const Tensor& x_tensor, const PatchGrid& patch_grid)
      : GridArguments(patch_grid),
        x("x", x_tensor, {batch, patches, channels}, dtype),
        hidden("scale**2 * channels", grid.per_token() * channels) {}
};

struct UnshuffleArguments : GridArguments {
  Size hidden{"scale**2 * channels"};
  View<3> x;
  int64_t channels;

  UnshuffleArguments(const Tensor& x_tensor, const PatchGrid& patch_grid)
      : GridArguments(patch_grid),
        x("x", x_tensor, {batch, tokens, hidden}, dtype),
        channels(hidden / grid.per_token()) {
    STD_TORCH_CHECK(hidden % grid.per_token() == 0, "x must have a multiple of ", grid.per_token(), " channels, got ",
                    hidden);
  }
};

// Shared by forward and backward of the norm, which is over a whole token or over each of its patches.
struct ShuffleNormArguments : ShuffleArguments {
  Size norm_size;
  View<1> weight;

  ShuffleNormArguments(const Tensor& x_tensor, const Tensor& weight_tensor, const PatchGrid& patch_grid)
      : ShuffleArguments(x_tensor, patch_grid),
        norm_size(weight_tensor.numel() == channels ? channels : hidden),
        weight("norm_weight", weight_tensor, {norm_size}, dtype) {
    check_within("the elements of norm_weight", norm_size, 0, (int64_t{1} << 30) - 1);  // they are counted in 32 bits
  }

  bool each_patch() const { return norm_size == channels; }
};

struct ShuffleNormForwardArguments : ShuffleNormArguments {
  View<1> bias;

  ShuffleNormForwardArguments(const Tensor& x_tensor, const Tensor& weight_tensor, const Tensor& bias_tensor,
                              const PatchGrid& patch_grid)
      : ShuffleNormArguments(x_tensor, weight_tensor, patch_grid), bias("norm_bias", bias_tensor, {norm_size}, dtype) {}
};

struct ShuffleNormBackwardArguments : ShuffleNormArguments {
  View<2> grad_output;  // (batch * tokens, hidden)

  ShuffleNormBackwardArguments(const Tensor& grad_tensor, const Tensor& x_tensor, const Tensor& weight_tensor,
                               const PatchGrid& patch_grid)
      : ShuffleNormArguments(x_tensor, weight_tensor, patch_grid),
        grad_output("grad_output", grad_tensor, {{batch, tokens}, hidden}, dtype) {}
};

}  // namespace vlmfast

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
