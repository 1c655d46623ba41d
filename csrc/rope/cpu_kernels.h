// The interface of the CPU kernels of rotary embedding; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// How heads are normalised: not at all, with one rounding after the weight, or with a second one before the weight.
enum class HeadNorm { kNone, kOnce, kTwice };

// The cosines and sines of the rows. With sections, the tables of the three axes follow one another.
struct RopeAngles {
  const void *cos, *sin;  // (axes, rows, rotary_dim)
  int64_t rows, rotary_dim;
  int64_t cos_row_stride, sin_row_stride;
  int64_t ends[2];  // the ends of the first two sections, in frequencies
  bool wide;        // whether angles are float32 while heads are of 16 bits
};

struct RopeHeads {
  int64_t heads;
  const void* x;       // (rows, heads, head_dim)
  const void* weight;  // (head_dim,), or null
  void* y;             // (rows, heads, head_dim) contiguous
  int64_t row_stride, head_stride;
};

struct RopeForward {
  float eps, weight_offset;  // weight_offset: added to the weight, 1 or -0, which changes no value
  int64_t head_dim;
  RopeAngles angles;
  RopeHeads parts[2];  // queries, then keys
};

// The gradients of heads, in x, and the heads that the forward normalised.
struct RopeBackwardHeads : RopeHeads {
  const void* normed;  // (rows, heads, head_dim), or null
  int64_t normed_row_stride, normed_head_stride;
};

struct RopeBackward {
  float eps, weight_offset;
  bool rounded;  // whether normalised heads are rounded before the weight
  int64_t head_dim;
  RopeAngles angles;
  RopeBackwardHeads parts[2];
};

struct RopeKernels {
  // Indexed by the norm, whether angles are wide, and the dtype of heads.
  ByDtype<void(const RopeForward& args, int64_t begin, int64_t end)> forward[3][2];
  // Indexed by whether there is a norm, and the dtype. partials: the partial sums of the weight gradients of queries and
  // of keys (see types.h), or null.
  ByDtype<void(const RopeBackward& args, int64_t begin, int64_t end, float* const (&partials)[2])> backward[2];
  ByDtype<SumPartials> sum_partials;
};

}  // namespace vlmfast
