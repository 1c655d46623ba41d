// The pixel shuffle ops on the CPU: where patches and tokens lie, outputs and threads. Rows that are only moved go
// through row_moves.h, the LayerNorm is in cpu_kernels.cpp.
#include <memory>
#include <tuple>
#include <vector>

#include "common/row_moves.h"
#include "pixel_shuffle/cpu_kernels.h"
#include "pixel_shuffle/ops.h"

namespace vlmfast {
namespace {

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
  // Neighbours along a row of the image are neighbours in the token: one run of elements, where memory has them so.
  int64_t run_patches(bool adjacent) const { return adjacent ? scale_ : 1; }

  // function(token, part, patch) for each run of a token: `part` is its first patch within the token, `patch` within the
  // image.
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

// The patches of x, and the runs of them that its tokens are made of.
struct Patches {
  Layout layout;
  Size batch{"batch"}, patches, tokens, channels{"channels"};
  FloatDtype dtype;
  View<3> x;
  Size hidden;
  bool adjacent;  // whether each patch begins where the one before it ends

  Patches(const Tensor& tensor, const std::vector<int64_t>& grid, int64_t scale, TokenOrder order)
      : layout(grid, scale, order),
        patches("patches", layout.patches()),
        tokens("tokens", layout.tokens()),
        x("x", tensor, {batch, patches, channels}, dtype),
        hidden("hidden", layout.token_patches() * channels),
        adjacent(patches < 2 || x.stride(1) == channels) {}

  int64_t run_patches() const { return layout.run_patches(adjacent); }
  int64_t run_size() const { return run_patches() * channels; }

  // Where the runs of all tokens lie, in the order of the tokens.
  std::vector<const char*> runs() const {
    std::vector<const char*> found;
    found.reserve(batch * patches / run_patches());
    for (int64_t b = 0; b < batch; ++b) {
      layout.each_run(adjacent, [&](int64_t, int64_t, int64_t patch) { found.push_back(x.at(b, patch)); });
    }
    return found;
  }
};

Tensor pixel_shuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale) {
  const Patches from(x, grid, scale, order);
  return written_rows({from.batch, from.tokens, from.hidden}, x, from.run_size(), from.runs().data(), nullptr,
                      input_scale);
}

Tensor pixel_unshuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const Layout layout(grid, scale, order);
  Size batch("batch"), tokens("tokens", layout.tokens()), hidden("hidden");
  FloatDtype dtype;
  const View from("x", x, {batch, tokens, hidden}, dtype);
  STD_TORCH_CHECK(hidden % layout.token_patches() == 0, "x must have a multiple of ", layout.token_patches(),
                  " channels, got ", hidden);
  const int64_t channels = hidden / layout.token_patches(), run_patches = layout.run_patches(true);
  std::vector<const char*> runs(batch * layout.patches() / run_patches);
  for (int64_t b = 0; b < batch; ++b) {
    layout.each_run(true, [&](int64_t token, int64_t part, int64_t patch) {
      runs[(b * layout.patches() + patch) / run_patches] = from.at(b, token, part * channels);
    });
  }
  return written_rows({batch, layout.patches(), channels}, x, run_patches * channels, runs.data(), nullptr,
                      input_scale);
}

// ---- with a LayerNorm ----

// What both directions need to know of a call. The norm is over a token, or over each of its patches.
struct NormCall : Patches {
  Size norm_size;
  View<1> weight;
  std::vector<const char*> x_runs;
  ShuffledNorm norm;

  NormCall(const Tensor& tensor, const Tensor& norm_weight, const std::vector<int64_t>& grid, int64_t scale,
           TokenOrder order, double input_scale, double eps)
      : Patches(tensor, grid, scale, order),
        norm_size(norm_weight.numel() == channels ? channels : hidden),
        weight("norm_weight", norm_weight, {norm_size}, dtype),
        x_runs(runs()),
        norm{static_cast<float>(input_scale),
             static_cast<float>(eps),
             layout.token_patches() / run_patches(),
             run_size(),
             norm_size,
             x_runs.data(),
             weight.data()} {}
};

Tensor pixel_shuffle_norm(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                          std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale,
                          double norm_eps) {
  NormCall call(x, norm_weight, grid, scale, order, input_scale, norm_eps);
  const View bias("norm_bias", norm_bias, {call.norm_size}, call.dtype);
  Tensor y = allocate_output({call.batch, call.tokens, call.hidden}, x, call.dtype);
  if (y.numel() == 0) return y;
  const PixelShuffleNorm args{call.norm, bias.data(), static_cast<char*>(y.mutable_data_ptr())};
  const auto norm = kernels<PixelShuffleKernels>().norm[call.dtype];
  const int64_t tokens = call.batch * call.tokens;
  parallel_rows(tokens, row_ranges(tokens, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { norm(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> pixel_shuffle_norm_backward(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& norm_weight, std::vector<int64_t> grid,
                                                               int64_t scale, TokenOrder order, double input_scale,
                                                               double norm_eps) {
  NormCall call(x, norm_weight, grid, scale, order, input_scale, norm_eps);
  const View grads("grad_output", grad_output, {{call.batch, call.tokens}, call.hidden}, call.dtype);
  Tensor grad_x = allocate_output(x.sizes(), x, call.dtype);
  Tensor grad_weight = allocate({call.norm_size}, x, call.dtype), grad_bias = allocate({call.norm_size}, x, call.dtype);

  const int64_t tokens = grads.size(0), patch_bytes = call.channels * call.x.width();
  std::vector<const char*> grad_tokens;
  grad_tokens.reserve(tokens);
  for (int64_t token = 0; token < tokens; ++token) grad_tokens.push_back(grads.at(token));
  std::vector<char*> grad_runs;
  grad_runs.reserve(call.x_runs.size());
  char* const grad_data = static_cast<char*>(grad_x.mutable_data_ptr());
  for (int64_t b = 0; b < call.batch; ++b) {
    call.layout.each_run(call.adjacent, [&](int64_t, int64_t, int64_t patch) {
      grad_runs.push_back(grad_data + (b * call.patches + patch) * patch_bytes);
    });
  }

  const PixelShuffleNormBackward args{call.norm, grad_tokens.data(), grad_runs.data()};
  const auto& table = kernels<PixelShuffleKernels>();
  const int64_t ranges = row_ranges(tokens, call.hidden), partial = partial_size(call.norm_size);
  const int64_t token_bytes = call.hidden * call.x.width();
  const std::unique_ptr<char[]> buffers(new char[ranges * token_bytes]);
  const std::unique_ptr<float[]> weight_partials(new float[ranges * partial]()),
      bias_partials(new float[ranges * partial]());
  if (grad_x.numel() > 0) {
    parallel_rows(tokens, ranges, [&](int64_t begin, int64_t end, int64_t range) {
      table.norm_backward[call.dtype](args, begin, end, &buffers[range * token_bytes],
                                      &weight_partials[range * partial], &bias_partials[range * partial]);
    });
  }
  const auto sum = table.sum_partials[call.dtype];
  sum(call.norm_size, weight_partials.get(), ranges, grad_weight.mutable_data_ptr());
  sum(call.norm_size, bias_partials.get(), ranges, grad_bias.mutable_data_ptr());
  return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
