// The pixel shuffle ops on the CPU: the addresses of patches and tokens, outputs and threads. Rows that are only moved
// use row_moves.h; the LayerNorm is in cpu_kernels.cpp.
#include <memory>
#include <tuple>
#include <vector>

#include "common/row_moves.h"
#include "pixel_shuffle/cpu_kernels.h"
#include "pixel_shuffle/ops.h"

namespace vlmfast {
namespace {

// Returns whether patches are contiguous. The `scale` patches of a token in one row of the image are then one run of
// elements.
bool adjacent(const ShuffleArguments& call) { return call.patches < 2 || call.x.stride(1) == call.channels; }
int64_t run_patches(const PatchGrid& grid, bool adjacent) { return adjacent ? grid.scale : 1; }

// Calls function(token, part, patch) for each run of each token. `part` is the index of the run's first patch in the
// token, `patch` its index in the image.
template <class Function>
void each_run(const PatchGrid& grid, bool adjacent, const Function& function) {
  const int64_t scale = grid.scale, rows = grid.height / scale, columns = grid.width / scale;
  const int64_t step = run_patches(grid, adjacent);
  const bool by_row = grid.order == TokenOrder::kRow;
  const int64_t lines = by_row ? rows : columns, places = by_row ? columns : rows;
  for (int64_t line = 0, token = 0; line < lines; ++line) {
    for (int64_t place = 0; place < places; ++place, ++token) {
      const int64_t top = (by_row ? line : place) * scale, left = (by_row ? place : line) * scale;
      for (int64_t dy = 0; dy < scale; ++dy) {
        for (int64_t dx = 0; dx < scale; dx += step) {
          function(token, dy * scale + dx, (top + dy) * grid.width + left + dx);
        }
      }
    }
  }
}

// Returns the number of elements in a run of x.
int64_t run_size(const ShuffleArguments& call) { return run_patches(call.grid, adjacent(call)) * call.channels; }

// Returns the addresses of the runs of x, in the order of the tokens.
std::vector<const char*> runs_of(const ShuffleArguments& call) {
  std::vector<const char*> found;
  found.reserve(call.batch * call.patches / run_patches(call.grid, adjacent(call)));
  for (int64_t b = 0; b < call.batch; ++b) {
    each_run(call.grid, adjacent(call), [&](int64_t, int64_t, int64_t patch) { found.push_back(call.x.at(b, patch)); });
  }
  return found;
}

Tensor pixel_shuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale) {
  const ShuffleArguments call(x, {grid, scale, order});
  return written_rows({call.batch, call.tokens, call.hidden}, x, run_size(call), runs_of(call).data(), nullptr,
                      input_scale);
}

Tensor pixel_unshuffle(const Tensor& x, std::vector<int64_t> grid, int64_t scale, TokenOrder order,
                       double input_scale) {
  const UnshuffleArguments call(x, {grid, scale, order});
  const int64_t patches = run_patches(call.grid, true);
  std::vector<const char*> runs(call.batch * call.patches / patches);
  for (int64_t b = 0; b < call.batch; ++b) {
    each_run(call.grid, true, [&](int64_t token, int64_t part, int64_t patch) {
      runs[(b * call.patches + patch) / patches] = call.x.at(b, token, part * call.channels);
    });
  }
  return written_rows({call.batch, call.patches, call.channels}, x, patches * call.channels, runs.data(), nullptr,
                      input_scale);
}

// ---- with a LayerNorm ----

// Returns the kernel arguments that forward and backward share.
ShuffledNorm shuffled_norm(const ShuffleNormArguments& call, const std::vector<const char*>& runs, double input_scale,
                           double eps) {
  return {static_cast<float>(input_scale),
          static_cast<float>(eps),
          call.grid.per_token() / run_patches(call.grid, adjacent(call)),
          run_size(call),
          call.norm_size,
          runs.data(),
          call.weight.data()};
}

Tensor pixel_shuffle_norm(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                          std::vector<int64_t> grid, int64_t scale, TokenOrder order, double input_scale,
                          double norm_eps) {
  const ShuffleNormForwardArguments call(x, norm_weight, norm_bias, {grid, scale, order});
  Tensor y = allocate_output({call.batch, call.tokens, call.hidden}, x, call.dtype);
  if (y.numel() == 0) return y;
  const std::vector<const char*> runs = runs_of(call);
  const PixelShuffleNorm args{shuffled_norm(call, runs, input_scale, norm_eps), call.bias.data(),
                              static_cast<char*>(y.mutable_data_ptr())};
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
  const ShuffleNormBackwardArguments call(grad_output, x, norm_weight, {grid, scale, order});
  Tensor grad_x = allocate_output(x.sizes(), x, call.dtype);
  Tensor grad_weight = allocate({call.norm_size}, x, call.dtype), grad_bias = allocate({call.norm_size}, x, call.dtype);

  const int64_t tokens = call.grad_output.size(0), patch_bytes = call.channels * call.x.width();
  const std::vector<const char*> runs = runs_of(call);
  std::vector<const char*> grad_tokens;
  grad_tokens.reserve(tokens);
  for (int64_t token = 0; token < tokens; ++token) grad_tokens.push_back(call.grad_output.at(token));
  std::vector<char*> grad_runs;
  grad_runs.reserve(runs.size());
  char* const grad_data = static_cast<char*>(grad_x.mutable_data_ptr());
  for (int64_t b = 0; b < call.batch; ++b) {
    each_run(call.grid, adjacent(call), [&](int64_t, int64_t, int64_t patch) {
      grad_runs.push_back(grad_data + (b * call.patches + patch) * patch_bytes);
    });
  }

  const PixelShuffleNormBackward args{shuffled_norm(call, runs, input_scale, norm_eps), grad_tokens.data(),
                                      grad_runs.data()};
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
