// The interface of the CPU kernels of patch-info mining; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// One row of channels for each token.
struct TokenRows {
  const void* data;
  int64_t batch_stride, token_stride;  // in elements
};

struct Mining {
  int64_t tokens, channels, scale;
  int64_t columns;  // blocks in a row of the map
  float eps;
  TokenRows query, grad_output;  // grad_output: only in the backward
  const void* map;
  int64_t map_strides[3];  // between images, channels and rows, in elements
  const int64_t* blocks;   // the block of each token, or null if tokens and blocks are in the same order
  int64_t blocks_stride;   // of `blocks` between images
  void* y;                 // (batch, tokens, channels): the mined features, or the gradient of the queries
  void* grad_map;          // (batch, channels, height, width), only in the backward
  int64_t height, width;   // of grad_map
};

struct PatchMiningKernels {
  // Take the tokens from `begin` to `end`, counted over the batch. workspace: as many floats as `workspace` returns.
  ByDtype<void(const Mining& args, int64_t begin, int64_t end, float* workspace)> forward, backward;
  int64_t (*workspace)(int64_t channels, int64_t scale);
};

}  // namespace vlmfast
