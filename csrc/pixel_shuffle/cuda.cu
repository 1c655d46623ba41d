// Pixel shuffle on CUDA: the map's patches moved, moved back, and normalised on the way, forward and backward.
// vlmfast/ops/pixel_shuffle.py defines what is computed.
//
// All four are bound by memory. For P patches of C elements of s bytes they move, besides the weight and the bias,
//   pixel_shuffle                 2 P C s   x in, where it lies, and the tokens out
//   pixel_unshuffle               2 P C s
//   pixel_shuffle_norm            2 P C s   a row is read once, and stays in registers for mean, variance and result
//   pixel_shuffle_norm_backward   3 P C s   the gradient and x in, grad_x out; 16 B K more for the float32 partial sums
//                                           of B persistent blocks, K the size of the weight
// in one launch each, and one more to add up the partial sums. The forward stores nothing for the backward, where mean
// and deviation come out of the same two reductions as the means of the gradient. The variance is that of centred
// values: rows of vision towers have means far from zero. Rows longer than registers hold (8192 elements in half
// precision) are read again, from the caches. A patch is C neighbouring elements on both sides, so no access is
// scattered.
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cuda_torch.h"
#include "common/row_moves.cuh"
#include "common/row_policy.cuh"
#include "pixel_shuffle/patch_map.cuh"
#include "pixel_shuffle/patch_norm.cuh"
#include "pixel_shuffle/ops.h"

namespace vlmfast {
namespace {

// ---- which patch goes where ----

template <typename scalar_t>
constexpr Arithmetic kScaling = std::is_same_v<scalar_t, Word> ? Arithmetic::kNone : Arithmetic::kMultiply;

template <typename scalar_t>
struct ShufflePatches {
  static constexpr Arithmetic kArithmetic = kScaling<scalar_t>;
  PatchMap map;
  ImagePointer<scalar_t> x;
  scalar_t* tokens;
  int64_t channels;
  float factor;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t ordinal) const {
    const auto [image, patch] = map.place(ordinal);
    return {x.at(image, patch), tokens + ordinal * channels};
  }
};

template <typename scalar_t>
struct UnshufflePatches {
  static constexpr Arithmetic kArithmetic = kScaling<scalar_t>;
  PatchMap map;
  RowPointer<scalar_t> tokens;
  scalar_t* patches;
  int64_t channels;
  float factor;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t ordinal) const {
    const auto [image, patch] = map.place(ordinal);
    const unsigned token = static_cast<unsigned>(ordinal) / map.per_token, part = ordinal - token * map.per_token;
    return {tokens[token] + part * channels, patches + (int64_t{image} * map.patches + patch) * channels};
  }
};

// ---- launchers ----

PatchMap patch_map(const std::vector<int64_t>& grid, int64_t scale, TokenOrder order, int64_t images) {
  constexpr int64_t kMost = int64_t{1} << 31;  // patches are counted in 32 bits
  STD_TORCH_CHECK(grid.size() == 2 && scale > 0 && scale < kMost, "grid must be (height, width), scale at least 1");
  const int64_t height = grid[0], width = grid[1];
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height % scale == 0 && width % scale == 0,
                  "grid must be divisible by scale, ", scale, ", got (", height, ", ", width, ")");
  STD_TORCH_CHECK(width == 0 || images == 0 || height < kMost / width / images, "x must have fewer than 2^31 patches");
  PatchMap map;
  map.patches = height * width;
  map.width = width;
  map.scale = scale;
  map.per_token = scale * scale;
  map.token_line = (order == TokenOrder::kColumn ? height : width) / scale;
  map.by_column = order == TokenOrder::kColumn;
  return map;
}

// function(scalar_t()) for what moved rows are made of.
template <typename Function>
void with_moved_type(const Tensor& x, double input_scale, Function&& function) {
  if (input_scale == 1.) return function(Word());
  with_dtype(dtype_of(x), function);
}

void check_patches(const Images& x, const PatchMap& map) {
  STD_TORCH_CHECK(x.rows == map.patches, "x must have shape (B, ", map.patches, ", C)");
}

Tensor allocate_tokens(const Images& x, int64_t scale) {
  const int64_t per_token = scale * scale, sizes[] = {x.count, x.rows / per_token, x.size * per_token};
  return allocate(sizes, 3, x.tensor);
}

Tensor pixel_shuffle(const Tensor& x_tensor, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                     double input_scale) {
  const Images x(x_tensor);
  const PatchMap map = patch_map(grid, scale, order, x.count);
  check_patches(x, map);
  Tensor tokens = allocate_tokens(x, scale);
  const DeviceScope scope(x_tensor);
  with_moved_type(x_tensor, input_scale, [&](auto zero) {
    using scalar_t = decltype(zero);
    const ShufflePatches<scalar_t> move{map, scope.input<scalar_t>(x), scope.output<scalar_t>(tokens),
                                        count_in<scalar_t>(x_tensor, x.size), static_cast<float>(input_scale)};
    launch_move(scope, x.count * x.rows, move.channels, {move.x.rows(), move.x.images()}, move);
  });
  return tokens;
}

Tensor pixel_unshuffle(const Tensor& x_tensor, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const Images x(x_tensor);
  const PatchMap map = patch_map(grid, scale, order, x.count);
  const int64_t per_token = scale * scale;
  STD_TORCH_CHECK(x.rows == map.patches / per_token, "x must have shape (B, ", map.patches / per_token, ", C)");
  STD_TORCH_CHECK(x.size % per_token == 0, "x must have a multiple of ", per_token, " channels, got ", x.size);
  const int64_t sizes[] = {x.count, map.patches, x.size / per_token};
  Tensor patches = allocate(sizes, 3, x_tensor);
  const Rows tokens(x.tensor);
  const DeviceScope scope(x_tensor);
  with_moved_type(x_tensor, input_scale, [&](auto zero) {
    using scalar_t = decltype(zero);
    const UnshufflePatches<scalar_t> move{map, scope.input<scalar_t>(tokens), scope.output<scalar_t>(patches),
                                          count_in<scalar_t>(x_tensor, sizes[2]), static_cast<float>(input_scale)};
    launch_move(scope, x.count * sizes[1], move.channels, {move.tokens}, move);
  });
  return patches;
}

// What both directions of the norm need to know of a call.
struct NormCall {
  Images x;
  Rows weight;
  NormRows rows;
  NormSettings settings;

  NormCall(const Tensor& x_tensor, const Tensor& weight_tensor, const std::vector<int64_t>& grid, int64_t scale,
           TokenOrder order, double input_scale, double eps)
      : x(x_tensor), weight(weight_tensor), settings{static_cast<float>(input_scale), static_cast<float>(eps)} {
    const PatchMap map = patch_map(grid, scale, order, x.count);
    check_patches(x, map);
    const int64_t patches = weight.size == x.size ? 1 : scale * scale;
    STD_TORCH_CHECK(weight.count == 1 && weight.size == patches * x.size, "norm_weight must have shape (",
                    scale * scale * x.size, ",) or (", x.size, ",)");
    STD_TORCH_CHECK(weight.size < int64_t{1} << 30, "norm_weight must have fewer than 2^30 elements");  // in 32 bits
    STD_TORCH_CHECK(dtype_of(weight_tensor) == dtype_of(x_tensor), "norm_weight must have the dtype of x");
    rows.map = map;
    rows.patches = patches;
    rows.channels = x.size;
    rows.count = x.count * x.rows / patches;
    rows.size = weight.size;
  }
};

Tensor pixel_shuffle_norm(const Tensor& x_tensor, const Tensor& weight, const Tensor& bias_tensor,
                          std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale, double eps) {
  const NormCall call(x_tensor, weight, grid, scale, order, input_scale, eps);
  const Rows bias(bias_tensor);
  check_weight(bias, call.weight);
  Tensor y = allocate_tokens(call.x, scale);
  if (call.rows.count * call.rows.size == 0) return y;
  const DeviceScope scope(x_tensor);
  with_dtype(dtype_of(x_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto x = scope.input<scalar_t>(call.x);
    const auto weight_row = scope.input<scalar_t>(call.weight), bias_row = scope.input<scalar_t>(bias);
    scalar_t* const y_data = scope.output<scalar_t>(y);
    const RowPointer<scalar_t> patches{y_data, call.x.size};  // a vector must not reach from one into the next
    with_row_policy<scalar_t>(call.rows.size, {x.rows(), x.images(), weight_row, bias_row, patches}, [&](auto policy) {
      using Policy = decltype(policy);
      check_cuda(launch(pixel_shuffle_norm_kernel<scalar_t, Policy>,
                        dim3(row_blocks<Policy>(call.rows.count, kMaxBlocks)), dim3(Policy::kThreads), 0,
                        scope.stream(), x, weight_row.data, bias_row.data, y_data, call.rows, call.settings));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pixel_shuffle_norm_backward(const Tensor& grad_tensor, const Tensor& x_tensor,
                                                               const Tensor& weight, std::vector<int64_t> grid,
                                                               int64_t scale, TokenOrder order, double input_scale,
                                                               double eps) {
  const NormCall call(x_tensor, weight, grid, scale, order, input_scale, eps);
  const Rows grad_output(grad_tensor);
  STD_TORCH_CHECK(grad_output.count * scale * scale == call.x.count * call.x.rows &&
                      grad_output.size == call.x.size * scale * scale,
                  "grad_output must have the shape of the output");
  STD_TORCH_CHECK(dtype_of(grad_tensor) == dtype_of(x_tensor), "grad_output must have the dtype of x");
  Tensor grad_x = allocate_like(x_tensor), grad_weight = allocate_like(weight), grad_bias = allocate_like(weight);
  if (call.rows.size == 0) return {grad_x, grad_weight, grad_bias};
  const DeviceScope scope(x_tensor);
  with_dtype(dtype_of(x_tensor), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto x = scope.input<scalar_t>(call.x);
    const auto grad_rows = scope.input<scalar_t>(grad_output), weight_row = scope.input<scalar_t>(call.weight);
    scalar_t* const grad_x_data = scope.output<scalar_t>(grad_x);
    const RowPointer<scalar_t> patches{grad_x_data, call.x.size};  // a vector must not reach from one into the next
    with_row_policy<scalar_t>(call.rows.size, {x.rows(), x.images(), weight_row, grad_rows, patches}, [&](auto policy) {
      using Policy = decltype(policy);
      const int64_t resident = int64_t{scope.multiprocessors()} * Policy::kBlocksPerMultiprocessor;
      const int64_t blocks = row_blocks<Policy>(call.rows.count, resident);
      const Tensor partials = float_buffer(blocks * 2 * call.rows.size, x_tensor);
      float* const partials_data = scope.output<float>(partials);
      if (blocks > 0) {
        check_cuda(launch(pixel_shuffle_norm_backward_kernel<scalar_t, Policy>, dim3(blocks), dim3(Policy::kThreads), 0,
                          scope.stream(), grad_rows, x, weight_row.data, grad_x_data, partials_data, call.rows,
                          call.settings));
      }
      launch_sum_partials(scope, partials_data, blocks, call.rows.size, scope.output<scalar_t>(grad_weight),
                          scope.output<scalar_t>(grad_bias));
    });
  });
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
