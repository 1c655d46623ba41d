// The CPU kernels of patch-info mining, as cpu.cpp calls them.
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
  TokenRows query, grad_output;  // the second in the backward alone
  const void* map;
  int64_t map_strides[3];  // of images, channels and rows, in elements
  const int64_t* blocks;   // of each token, or none
  int64_t blocks_stride;   // of images
  void* y;                 // (batch, tokens, channels): what is mined, or the gradient of the queries
  void* grad_map;          // (batch, channels, height, width), in the backward alone
  int64_t height, width;   // of grad_map
};

struct PatchMiningKernels {
  // For the tokens of all images from begin to end. workspace: as many floats as `workspace` says.
  ByDtype<void(const Mining& args, int64_t begin, int64_t end, float* workspace)> forward, backward;
  int64_t (*workspace)(int64_t channels, int64_t scale);
};

}  // namespace vlmfast
