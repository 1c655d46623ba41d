// The pixel shuffle ops on the CPU: where patches and tokens lie, outputs and threads. What is only moved goes through
// row_moves.h, the LayerNorm is in pixel_shuffle_kernels.cpp.
#include "common/cpu.h"

#include <memory>
#include <tuple>
#include <vector>

#include "common/common.h"
#include "common/row_moves.h"
#include "pixel_shuffle/cpu_kernels.h"
#include "pixel_shuffle/ops.h"

namespace vlmfast {
namespace {

const PixelShuffleKernels& kernels() {
  static const PixelShuffleKernels table = at_cpu_level([](auto level) { return pixel_shuffle_kernels<level>(); });
  return table;
}

// Which patches a token is made of.
class Layout {
 public:
  Layout(const std::vector<int64_t>& grid, int64_t scale, TokenOrder order) : scale_(scale), order_(order) {
    STD_TORCH_CHECK(scale > 0, "scale must be at least 1, got ", scale);
    STD_TORCH_CHECK(grid.size() == 2 && grid[0] >= 0 && grid[1] >= 0 && grid[0] % scale == 0 && grid[1] % scale == 0,
                    "grid must be (height, width), both divisible by scale");
    height_ = grid[0];
    width_ = grid[1];
  }

  int64_t patches() const { return height_ * width_; }
  int64_t tokens() const { return patches() / token_patches(); }
  int64_t token_patches() const { return scale_ * scale_; }
  // The neighbours along a row of the image are neighbours in the token: one run of elements, where memory has them so.
  int64_t run_patches(bool adjacent) const { return adjacent ? scale_ : 1; }

  // function(token, part, patch) for each run of a token: `part` counts its patches, `patch` those of the image.
  template <class Function>
  void each_run(bool adjacent, const Function& function) const {
    const int64_t rows = height_ / scale_, columns = width_ / scale_, step = run_patches(adjacent);
    const bool by_row = order_ == TokenOrder::kRow;
    const int64_t lines = by_row ? rows : columns, places = by_row ? columns : rows;
    for (int64_t line = 0, token = 0; line < lines; ++line) {
      for (int64_t place = 0; place < places; ++place, ++token) {
        const int64_t top = (by_row ? line : place) * scale_, left = (by_row ? place : line) * scale_;
        for (int64_t dy = 0; dy < scale_; ++dy) {
          for (int64_t dx = 0; dx < scale_; dx += step) {
            function(token, dy * scale_ + dx, (top + dy) * width_ + left + dx);
          }
        }
      }
    }
  }

 private:
  int64_t height_, width_, scale_;
  TokenOrder order_;
};

// Where the runs of all tokens lie in x, in the order of the tokens.
std::vector<const char*> runs_of(const Sequences& x, const Layout& layout) {
  std::vector<const char*> runs(x.batch() * layout.patches() / layout.run_patches(x.adjacent()));
  const char** run = runs.data();
  for (int64_t image = 0; image < x.batch(); ++image) {
    layout.each_run(x.adjacent(), [&](int64_t, int64_t, int64_t patch) { *run++ = x.at(image, patch); });
  }
  return runs;
}

Tensor pixel_shuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale) {
  const Layout layout(grid, scale, order);
  const Sequences patches("x", x, layout.patches());
  const int64_t sizes[] = {patches.batch(), layout.tokens(), layout.token_patches() * patches.size()};
  const int64_t run_size = layout.run_patches(patches.adjacent()) * patches.size();
  return written_rows(sizes, 3, x, run_size, runs_of(patches, layout).data(), nullptr, input_scale);
}

Tensor pixel_unshuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const Layout layout(grid, scale, order);
  const Sequences tokens("x", x, layout.tokens());
  STD_TORCH_CHECK(tokens.size() % layout.token_patches() == 0, "x must have a multiple of scale**2 channels");
  const int64_t channels = tokens.size() / layout.token_patches(), run_patches = layout.run_patches(true);
  std::vector<const char*> runs(tokens.batch() * layout.patches() / run_patches);
  for (int64_t image = 0; image < tokens.batch(); ++image) {
    layout.each_run(true, [&](int64_t token, int64_t part, int64_t patch) {
      runs[(image * layout.patches() + patch) / run_patches] = tokens.at(image, token, part * channels);
    });
  }
  const int64_t sizes[] = {tokens.batch(), layout.patches(), channels};
  return written_rows(sizes, 3, x, run_patches * channels, runs.data(), nullptr, input_scale);
}

// ---- with a LayerNorm ----

// Refuses a weight or a bias that does not fit.
Rows norm_vector(const char* name, const Tensor& vector, const Tensor& x, const Layout& layout) {
  Rows rows(vector);
  STD_TORCH_CHECK(rows.count == 1 && (rows.size == x.size(2) || rows.size == layout.token_patches() * x.size(2)), name,
                  " must have shape (", layout.token_patches() * x.size(2), ",) or (", x.size(2), ",)");
  STD_TORCH_CHECK(dtype_of(vector) == dtype_of(x), name, " must have the dtype of x");
  return rows;
}

ShuffledNorm shuffled_norm(const Sequences& x, const Layout& layout, const std::vector<const char*>& runs,
                           const Rows& weight, double input_scale, double eps) {
  const int64_t run_patches = layout.run_patches(x.adjacent());
  return {dtype_of(weight.tensor),
          static_cast<float>(input_scale),
          static_cast<float>(eps),
          layout.token_patches() / run_patches,
          run_patches * x.size(),
          weight.size,
          runs.data(),
          weight.data()};
}

Tensor pixel_shuffle_norm(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                          std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale,
                          double norm_eps) {
  const Layout layout(grid, scale, order);
  const Sequences patches("x", x, layout.patches());
  const Rows weight = norm_vector("norm_weight", norm_weight, x, layout);
  const Rows bias = norm_vector("norm_bias", norm_bias, x, layout);
  STD_TORCH_CHECK(bias.size == weight.size, "norm_bias must have the shape of norm_weight");
  const int64_t sizes[] = {patches.batch(), layout.tokens(), layout.token_patches() * patches.size()};
  Tensor y = allocate_output(sizes, 3, x);
  if (y.numel() == 0) return y;
  const std::vector<const char*> runs = runs_of(patches, layout);
  const PixelShuffleNorm args{shuffled_norm(patches, layout, runs, weight, input_scale, norm_eps), bias.data(),
                              static_cast<char*>(y.mutable_data_ptr())};
  const int64_t tokens = sizes[0] * sizes[1];
  parallel_rows(tokens, row_ranges(tokens, sizes[2]),
                [&](int64_t begin, int64_t end, int64_t) { kernels().norm(args, begin, end); });
  return y;
}

// Where each token of the gradient begins.
std::vector<const char*> tokens_of(const Sequences& grad_output, const Layout& layout) {
  std::vector<const char*> tokens;
  tokens.reserve(grad_output.batch() * layout.tokens());
  for (int64_t image = 0; image < grad_output.batch(); ++image) {
    for (int64_t token = 0; token < layout.tokens(); ++token) tokens.push_back(grad_output.at(image, token));
  }
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor> pixel_shuffle_norm_backward(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& norm_weight, std::vector<int64_t> grid,
                                                               int64_t scale, TokenOrder order, double input_scale,
                                                               double norm_eps) {
  const Layout layout(grid, scale, order);
  const Sequences patches("x", x, layout.patches()), grads("grad_output", grad_output, layout.tokens());
  const Rows weight = norm_vector("norm_weight", norm_weight, x, layout);
  const int64_t token_size = layout.token_patches() * patches.size(), tokens = patches.batch() * layout.tokens();
  STD_TORCH_CHECK(grads.batch() == patches.batch() && grads.size() == token_size,
                  "grad_output must have the shape of the output, (", patches.batch(), ", ", layout.tokens(), ", ",
                  token_size, ")");
  STD_TORCH_CHECK(dtype_of(grad_output) == dtype_of(x), "grad_output must have the dtype of x");
  Tensor grad_x = allocate_output(x.sizes().data(), 3, x);
  Tensor grad_weight = allocate_like(norm_weight), grad_bias = allocate_like(norm_weight);

  const std::vector<const char*> runs = runs_of(patches, layout), grad_tokens = tokens_of(grads, layout);
  std::vector<char*> grad_runs;
  grad_runs.reserve(runs.size());
  char* const grad_data = static_cast<char*>(grad_x.mutable_data_ptr());
  const int64_t width = grad_x.element_size(), patch_bytes = patches.size() * width;
  for (int64_t image = 0; image < patches.batch(); ++image) {
    layout.each_run(patches.adjacent(), [&](int64_t, int64_t, int64_t patch) {
      grad_runs.push_back(grad_data + (image * layout.patches() + patch) * patch_bytes);
    });
  }

  const PixelShuffleNormBackward args{shuffled_norm(patches, layout, runs, weight, input_scale, norm_eps),
                                      grad_tokens.data(), grad_runs.data()};
  const int64_t ranges = row_ranges(tokens, token_size), partial = partial_size(weight.size);
  const int64_t token_bytes = token_size * width;
  const std::unique_ptr<char[]> buffers(new char[ranges * token_bytes]);
  const std::unique_ptr<float[]> weight_partials(new float[ranges * partial]()),
      bias_partials(new float[ranges * partial]());
  if (grad_x.numel() > 0) {
    parallel_rows(tokens, ranges, [&](int64_t begin, int64_t end, int64_t range) {
      kernels().norm_backward(args, begin, end, &buffers[range * token_bytes], &weight_partials[range * partial],
                              &bias_partials[range * partial]);
    });
  }
  const auto sum = [&](const float* partials, Tensor& to) {
    kernels().sum_partials(args.norm.dtype, weight.size, partials, ranges, to.mutable_data_ptr());
  };
  sum(weight_partials.get(), grad_weight);
  sum(bias_partials.get(), grad_bias);
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
