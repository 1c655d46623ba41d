// The interface of the CPU kernels of the novelty of tokens; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// Rows of `hidden` adjacent elements, one for each token of each frame of each video.
struct FrameRows {
  const void* data;
  int64_t frames, tokens, hidden;
  int64_t batch_stride, frame_stride, token_stride;  // in elements
};

struct FrameNovelty {
  FrameRows rows;
  float* mean;     // (batch, frames, hidden)
  float* novelty;  // (batch, frames, tokens)
  float* length;   // (batch, frames, tokens)
};

struct FrameChange {
  FrameRows rows;
  float* change;  // (batch, frames - 1, tokens)
};

struct FrameNoveltyKernels {
  // Takes the frames from `begin` to `end`, counted over the batch.
  ByDtype<void(const FrameNovelty& args, int64_t begin, int64_t end)> novelty;
  // Takes the elements of `change` from `begin` to `end`, counted over the batch.
  ByDtype<void(const FrameChange& args, int64_t begin, int64_t end)> change;
};

}  // namespace vlmfast
