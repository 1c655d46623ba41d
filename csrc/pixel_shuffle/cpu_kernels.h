// The interface of the CPU kernels of the pixel shuffle with a LayerNorm; cpu.cpp calls them. Without a LayerNorm rows
// are moved by row_moves.h.
#pragma once

#include "common/types.h"

namespace vlmfast {

// Tokens that each consist of `token_runs` runs of `run_size` adjacent elements of x, with a LayerNorm over `size`
// elements: a whole token, or each of its patches.
struct ShuffledNorm {
  float input_scale;
  float eps;
  int64_t token_runs;
  int64_t run_size;
  int64_t size;
  const char* const* x;  // (tokens * token_runs,): where each run begins
  const void* weight;    // (size,)

  int64_t token_size() const { return token_runs * run_size; }
};

struct PixelShuffleNorm {
  ShuffledNorm norm;
  const void* bias;  // (size,)
  char* y;           // (tokens, token_size) contiguous
};

struct PixelShuffleNormBackward {
  ShuffledNorm norm;
  const char* const* grad_output;  // (tokens,): where each begins
  char* const* grad_x;             // (tokens * token_runs,): where each run begins
};

struct PixelShuffleKernels {
  ByDtype<void(const PixelShuffleNorm& args, int64_t begin, int64_t end)> norm;
  // buffer: workspace for one token. grad_weight, grad_bias: partial sums, see types.h.
  ByDtype<void(const PixelShuffleNormBackward& args, int64_t begin, int64_t end, char* buffer, float* grad_weight,
               float* grad_bias)>
      norm_backward;
  ByDtype<SumPartials> sum_partials;
};

}  // namespace vlmfast
