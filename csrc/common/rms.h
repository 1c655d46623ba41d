// What ops with a norm by the root mean square share: for csrc/*_kernels.cpp alone, as vector.h.
#pragma once

#include "common/torch_sum.h"

namespace vlmfast {
namespace {

// 1 / sqrt(mean + eps) of the sums of N rows.
template <int N>
VLMFAST_INLINE void inverse_roots(const float* sums, int64_t hidden, float eps, float (&result)[N]) {
  VLMFAST_UNROLL
  for (int n = 0; n < N; ++n) result[n] = 1.0f / __builtin_sqrtf(sums[n] / static_cast<float>(hidden) + eps);
}

}  // namespace
}  // namespace vlmfast
