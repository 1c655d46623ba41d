// The CPU kernels of rotary embedding, as cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// How heads are normalised: not at all; once, with a rounding after the weight; or with one before it too.
enum class HeadNorm { kNone, kOnce, kTwice };

// The angles of rows; the axes of sections lie one after the other.
struct RopeAngles {
  const void *cos, *sin;  // (axes, rows, rotary_dim)
  int64_t rows, rotary_dim;
  int64_t cos_row_stride, sin_row_stride;
  int64_t ends[2];  // of the first two sections
  bool wide;        // whether they are float32 whatever the heads are
};

struct RopeHeads {
  int64_t heads;
  const void* x;       // (rows, heads, head_dim)
  const void* weight;  // (head_dim,), or null
  void* y;             // (rows, heads, head_dim) contiguous
  int64_t row_stride, head_stride;
};

struct RopeForward {
  float eps, weight_offset;  // weight_offset: added to the weight, 1 or the neutral -0
  int64_t head_dim;
  RopeAngles angles;
  RopeHeads parts[2];  // queries, then keys
};

// The gradients of heads, x, beside the heads that were normalised.
struct RopeBackwardHeads : RopeHeads {
  const void* normed;  // (rows, heads, head_dim), or null
  int64_t normed_row_stride, normed_head_stride;
};

struct RopeBackward {
  float eps, weight_offset;
  int64_t head_dim;
  RopeAngles angles;
  RopeBackwardHeads parts[2];
};

struct RopeKernels {
  // By the norm and whether angles are wide; the dtype is that of heads.
  ByDtype<void(const RopeForward& args, int64_t begin, int64_t end)> forward[3][2];
  // partials: of queries and of keys, the partial sums of the weight's gradient, see types.h; or null.
  ByDtype<void(const RopeBackward& args, int64_t begin, int64_t end, float* const (&partials)[2])> backward[3];
  ByDtype<SumPartials> sum_partials;
};

}  // namespace vlmfast
