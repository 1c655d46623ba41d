// Shared by the ops with an RMS norm. Only csrc/*/*_kernels.cpp may include this header.
#pragma once

#include "common/torch_sum.h"

namespace vlmfast {
namespace {

// Computes 1 / sqrt(mean + eps) for N rows from the sums of their squares.
template <int N>
VLMFAST_INLINE void inverse_roots(const float* sums, int64_t hidden, float eps, float (&result)[N]) {
  VLMFAST_UNROLL
  for (int n = 0; n < N; ++n) result[n] = 1.0f / __builtin_sqrtf(sums[n] / static_cast<float>(hidden) + eps);
}

}  // namespace
}  // namespace vlmfast
