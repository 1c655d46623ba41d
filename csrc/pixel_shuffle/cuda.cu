// Pixel shuffle on CUDA: the map's patches moved, moved back, and normalised on the way, forward and backward.
// vlmfast/ops/pixel_shuffle/definition.py defines what is computed.
//
// All four are bound by memory, in one launch each, and one more to add up partial sums. The forward stores nothing for
// the backward, where mean and deviation come out of the same two reductions as the means of the gradient. The variance
// is that of centred values: rows of vision towers have means far from zero. Rows longer than registers hold (8192
// elements in half precision) are read again, from the caches. A patch is one run of elements on both sides, so no
// access is scattered.
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
  Input<scalar_t, 2> tokens;  // of the whole batch
  scalar_t* patches;
  int64_t hidden;  // channels
  float factor;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t ordinal) const {
    const auto [image, patch] = map.place(ordinal);
    const unsigned token = static_cast<unsigned>(ordinal) / map.per_token, part = ordinal - token * map.per_token;
    return {tokens.at(token) + part * hidden, patches + (int64_t{image} * map.patches + patch) * hidden};
  }
};

constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // patches are counted in 32 bits

PatchMap patch_map(const std::vector<int64_t>& grid, int64_t scale, TokenOrder order) {
  STD_TORCH_CHECK(grid.size() == 2 && scale > 0 && scale <= kMost, "grid must be (height, width), scale at least 1");
  const int64_t height = grid[0], width = grid[1];
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height % scale == 0 && width % scale == 0,
                  "grid must be divisible by scale, ", scale, ", got (", height, ", ", width, ")");
  STD_TORCH_CHECK(width == 0 || height <= kMost / width, "grid must have fewer than 2^31 patches");
  PatchMap map;
  map.patches = height * width;
  map.width = width;
  map.scale = scale;
  map.per_token = scale * scale;
  map.token_line = (order == TokenOrder::kColumn ? height : width) / scale;
  map.by_column = order == TokenOrder::kColumn;
  return map;
}

// The sizes of a call.
struct PatchSizes {
  Size batch, patches, tokens, channels{"channels"};

  explicit PatchSizes(const PatchMap& map)
      : batch(Size("batch").at_most(kMost / std::max<int64_t>(map.patches, 1))),
        patches("patches", map.patches),
        tokens("tokens", map.patches / map.per_token) {}
};

Tensor pixel_shuffle(const Tensor& x_tensor, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                     double input_scale) {
  const PatchMap map = patch_map(grid, scale, order);
  PatchSizes sizes(map);
  FloatDtype dtype;
  const View x("x", x_tensor, {sizes.batch, sizes.patches, sizes.channels}, dtype);
  Tensor tokens = allocate({sizes.batch, sizes.tokens, sizes.channels * map.per_token}, x_tensor, dtype);
  const DeviceScope scope(x_tensor);
  const auto move_all = [&](auto zero) {
    using scalar_t = decltype(zero);
    const ShufflePatches<scalar_t> move{map, scope.input<scalar_t>(x), scope.output<scalar_t>(tokens),
                                        row_size<scalar_t>(x), static_cast<float>(input_scale)};
    launch_move<scalar_t>(scope, sizes.batch * sizes.patches, move, x);
  };
  input_scale == 1. ? move_all(Word()) : with_dtype(dtype, move_all);
  return tokens;
}

Tensor pixel_unshuffle(const Tensor& x_tensor, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const PatchMap map = patch_map(grid, scale, order);
  PatchSizes sizes(map);
  FloatDtype dtype;
  const View tokens("x", x_tensor, {{sizes.batch, sizes.tokens}, sizes.channels}, dtype);
  STD_TORCH_CHECK(sizes.channels % map.per_token == 0, "x must have a multiple of ", map.per_token, " channels, got ",
                  sizes.channels);
  Tensor patches = allocate({sizes.batch, sizes.patches, sizes.channels / map.per_token}, x_tensor, dtype);
  const DeviceScope scope(x_tensor);
  const auto move_all = [&](auto zero) {
    using scalar_t = decltype(zero);
    const UnshufflePatches<scalar_t> move{map, scope.input<scalar_t>(tokens), scope.output<scalar_t>(patches),
                                          row_size<scalar_t>(tokens) / map.per_token, static_cast<float>(input_scale)};
    launch_move<scalar_t>(scope, sizes.batch * sizes.patches, move, tokens);
  };
  input_scale == 1. ? move_all(Word()) : with_dtype(dtype, move_all);
  return patches;
}

// The arguments that both directions of the norm share.
struct NormArguments {
  PatchMap map;
  PatchSizes sizes;
  Size hidden = Size("hidden").at_most((int64_t{1} << 30) - 1);  // columns are counted in 32 bits
  FloatDtype dtype;
  View<3> x;
  View<1> weight;
  NormRows rows;

  NormArguments(const Tensor& x_tensor, const Tensor& weight_tensor, const std::vector<int64_t>& grid, int64_t scale,
                TokenOrder order, double input_scale, double eps)
      : map(patch_map(grid, scale, order)),
        sizes(map),
        x("x", x_tensor, {sizes.batch, sizes.patches, sizes.channels}, dtype),
        weight("norm_weight", weight_tensor, {hidden}, dtype) {
    const int64_t patches = hidden == sizes.channels ? 1 : map.per_token;
    STD_TORCH_CHECK(hidden == patches * sizes.channels, "norm_weight must have shape (", map.per_token * sizes.channels,
                    ",) or (", sizes.channels, ",), got (", hidden, ",)");
    rows.map = map;
    rows.patches = patches;
    rows.channels = sizes.channels;
    rows.count = sizes.batch * sizes.patches / patches;
    rows.hidden = hidden;
    rows.input_scale = input_scale;
    rows.eps = eps;
  }
};

Tensor pixel_shuffle_norm(const Tensor& x_tensor, const Tensor& weight, const Tensor& bias_tensor,
                          std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale, double eps) {
  NormArguments args(x_tensor, weight, grid, scale, order, input_scale, eps);
  const View bias("norm_bias", bias_tensor, {args.hidden}, args.dtype);
  const int64_t token_size = args.sizes.channels * args.map.per_token;
  Tensor y = allocate({args.sizes.batch, args.sizes.tokens, token_size}, x_tensor, args.dtype);
  if (args.rows.count * args.rows.hidden == 0) return y;
  const DeviceScope scope(x_tensor);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    launch_blocks(scope, pixel_shuffle_norm_kernel<scalar_t, Policy>, Policy::blocks(args.rows.count, kMaxBlocks),
                  Policy::kThreads, 0, scope.input<scalar_t>(args.x), scope.input<scalar_t>(args.weight).data,
                  scope.input<scalar_t>(bias).data, scope.output<scalar_t>(y), args.rows);
  };
  // A vector must not reach from one patch into the next: those of x fit, so those of y do.
  const bool fit = vectors_fit(kVectorBytes, args.x, args.weight, bias);
  with_row_policy<HeadRow, NarrowRow, MiddleRow, HiddenRow, LongRow>(args.dtype, args.hidden, fit, run);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pixel_shuffle_norm_backward(const Tensor& grad_tensor, const Tensor& x_tensor,
                                                               const Tensor& weight, std::vector<int64_t> grid,
                                                               int64_t scale, TokenOrder order, double input_scale,
                                                               double eps) {
  NormArguments args(x_tensor, weight, grid, scale, order, input_scale, eps);
  Size token_size("scale**2 * channels", args.sizes.channels * args.map.per_token);
  const View grad_output("grad_output", grad_tensor, {{args.sizes.batch, args.sizes.tokens}, token_size}, args.dtype);
  Tensor grad_x = allocate_like(x_tensor), grad_weight = allocate_like(weight), grad_bias = allocate_like(weight);
  if (args.hidden == 0) return {grad_x, grad_weight, grad_bias};
  const DeviceScope scope(x_tensor);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const int64_t resident = int64_t{scope.multiprocessors()} * Policy::kBlocksPerMultiprocessor;
    const int64_t blocks = Policy::blocks(args.rows.count, resident);
    const Tensor partials = float_buffer(blocks * 2 * args.hidden, x_tensor);
    float* const partials_data = scope.output<float>(partials);
    if (blocks > 0) {
      check_cuda(launch(pixel_shuffle_norm_backward_kernel<scalar_t, Policy>, dim3(blocks), dim3(Policy::kThreads), 0,
                        scope.stream(), scope.input<scalar_t>(grad_output), scope.input<scalar_t>(args.x),
                        scope.input<scalar_t>(args.weight).data, scope.output<scalar_t>(grad_x), partials_data,
                        args.rows));
    }
    launch_sum_partials(scope, partials_data, blocks, args.hidden, scope.output<scalar_t>(grad_weight),
                        scope.output<scalar_t>(grad_bias));
  };
  const bool fit = vectors_fit(kVectorBytes, args.x, args.weight, grad_output);
  with_row_policy<HeadRow, NarrowRow, MiddleRow, HiddenRow, LongRow>(args.dtype, args.hidden, fit, run);
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
