// Pixel shuffle on CUDA: its forward and inverse, and its fusion with a LayerNorm, forward and backward.
// vlmfast/ops/pixel_shuffle/definition.py defines what is computed.
//
// All four kernels are bound by memory and take one launch each; the backward of the norm has a second launch to add up
// partial sums. The forward saves nothing for the backward, which computes mean and deviation in the same two
// reductions as the means of the gradient. The variance is that of centred values, because rows of vision towers have
// means far from zero. What does not fit in registers (beyond 8192 elements in half precision) is read again from the
// caches. A patch is contiguous on both sides, so all accesses coalesce.
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/row_moves.cuh"
#include "pixel_shuffle/ops.h"
#include "pixel_shuffle/patch_norm.cuh"

namespace vlmfast {
namespace {

// ---- which patch goes where ----

template <typename scalar_t>
constexpr Arithmetic kScaling = std::is_same_v<scalar_t, Word> ? Arithmetic::kNone : Arithmetic::kMultiply;

template <typename scalar_t>
struct ShufflePatches {
  static constexpr Arithmetic kArithmetic = kScaling<scalar_t>;
  PatchMap map;
  Input<scalar_t, 3> x;
  scalar_t* tokens;
  int64_t hidden;  // channels
  float factor;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t ordinal) const {
    const auto [image, patch] = map.place(ordinal);
    return {x.at(image, patch), tokens + ordinal * hidden};
  }
};

template <typename scalar_t>
struct UnshufflePatches {
  static constexpr Arithmetic kArithmetic = kScaling<scalar_t>;
  PatchMap map;
  Input<scalar_t, 3> tokens;
  scalar_t* patches;
  int64_t hidden;  // channels
  float factor;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t ordinal) const {
    const auto [image, patch] = map.place(ordinal);
    const unsigned in_image = static_cast<unsigned>(ordinal) - image * map.patches;
    const unsigned token = in_image / map.per_token, part = in_image % map.per_token;
    return {tokens.at(image, token) + part * hidden, patches + (int64_t{image} * map.patches + patch) * hidden};
  }
};

PatchMap map_of(const PatchGrid& grid) {
  PatchMap map;
  map.patches = grid.patches();
  map.width = grid.width;
  map.scale = grid.scale;
  map.per_token = grid.per_token();
  map.token_line = (grid.order == TokenOrder::kColumn ? grid.height : grid.width) / grid.scale;
  map.by_column = grid.order == TokenOrder::kColumn;
  return map;
}

Tensor pixel_shuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale) {
  const ShuffleArguments args(x, {grid, scale, order});
  Tensor tokens = allocate({args.batch, args.tokens, args.hidden}, x, args.dtype);
  const DeviceScope scope(x);
  const auto move_all = [&](auto zero) {
    using scalar_t = decltype(zero);
    const ShufflePatches<scalar_t> move{map_of(args.grid), scope.input<scalar_t>(args.x),
                                        scope.output<scalar_t>(tokens), row_size<scalar_t>(args.x),
                                        static_cast<float>(input_scale)};
    launch_move<scalar_t>(scope, args.batch * args.patches, move, args.x);
  };
  input_scale == 1. ? move_all(Word()) : with_dtype(args.dtype, move_all);
  return tokens;
}

Tensor pixel_unshuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const UnshuffleArguments args(x, {grid, scale, order});
  Tensor patches = allocate({args.batch, args.patches, args.channels}, x, args.dtype);
  const DeviceScope scope(x);
  const auto move_all = [&](auto zero) {
    using scalar_t = decltype(zero);
    const UnshufflePatches<scalar_t> move{
        map_of(args.grid), scope.input<scalar_t>(args.x), scope.output<scalar_t>(patches),
        row_size<scalar_t>(args.x) / args.grid.per_token(), static_cast<float>(input_scale)};
    launch_move<scalar_t>(scope, args.batch * args.patches, move, args.x);
  };
  input_scale == 1. ? move_all(Word()) : with_dtype(args.dtype, move_all);
  return patches;
}

// Returns the rows that forward and backward of the norm work on.
NormRows rows_of(const ShuffleNormArguments& args, double input_scale, double eps) {
  NormRows rows;
  rows.map = map_of(args.grid);
  rows.patches = args.each_patch() ? 1 : rows.map.per_token;
  rows.channels = args.channels;
  rows.count = args.batch * args.patches / rows.patches;
  rows.hidden = args.norm_size;
  rows.input_scale = input_scale;
  rows.eps = eps;
  return rows;
}

Tensor pixel_shuffle_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, std::vector<int64_t> grid,
                          int64_t scale, TokenOrder order, double input_scale, double eps) {
  const ShuffleNormForwardArguments args(x, weight, bias, {grid, scale, order});
  Tensor y = allocate({args.batch, args.tokens, args.hidden}, x, args.dtype);
  if (y.numel() == 0) return y;
  const NormRows rows = rows_of(args, input_scale, eps);
  const DeviceScope scope(x);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    launch_blocks(scope, pixel_shuffle_norm_kernel<scalar_t, Policy>, Policy::blocks(rows.count, kMaxBlocks),
                  Policy::kThreads, 0, scope.input<scalar_t>(args.x), scope.input<scalar_t>(args.weight).data,
                  scope.input<scalar_t>(args.bias).data, scope.output<scalar_t>(y), rows);
  };
  // vectors_fit checks the patches of x, so no vector crosses a patch boundary, in y neither.
  const bool fit = vectors_fit(kVectorBytes, args.x, args.weight, args.bias);
  with_hidden_row_policy(args.dtype, args.norm_size, fit, run);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pixel_shuffle_norm_backward(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& weight, std::vector<int64_t> grid,
                                                               int64_t scale, TokenOrder order, double input_scale,
                                                               double eps) {
  const ShuffleNormBackwardArguments args(grad_output, x, weight, {grid, scale, order});
  Tensor grad_x = allocate_like(x), grad_weight = allocate_like(weight), grad_bias = allocate_like(weight);
  if (args.norm_size == 0) return {grad_x, grad_weight, grad_bias};
  const NormRows rows = rows_of(args, input_scale, eps);
  const DeviceScope scope(x);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const int64_t blocks = Policy::persistent_blocks(rows.count, scope.multiprocessors());
    const Tensor partials = float_buffer(blocks * 2 * rows.hidden, x);
    float* const partials_data = scope.output<float>(partials);
    if (blocks > 0) {
      check_cuda(launch(pixel_shuffle_norm_backward_kernel<scalar_t, Policy>, dim3(blocks), dim3(Policy::kThreads), 0,
                        scope.stream(), scope.input<scalar_t>(args.grad_output), scope.input<scalar_t>(args.x),
                        scope.input<scalar_t>(args.weight).data, scope.output<scalar_t>(grad_x), partials_data, rows));
    }
    launch_sum_partials(scope, partials_data, blocks, rows.hidden, scope.output<scalar_t>(grad_weight),
                        scope.output<scalar_t>(grad_bias));
  };
  const bool fit = vectors_fit(kVectorBytes, args.x, args.weight, args.grad_output);
  with_hidden_row_policy(args.dtype, args.norm_size, fit, run);
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
