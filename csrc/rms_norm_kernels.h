// The CPU kernels of RMSNorm, as rms_norm.cpp calls them.
#pragma once

#include <cstdint>

#include "types.h"

namespace vlmfast {

struct RmsNormForward {
  Dtype dtype;
  Variant variant;
  float eps;
  int64_t size;          // D
  const void* x;         // (rows, D)
  const void* residual;  // (rows, D), or null: without the addition
  const void* weight;    // (D,)
  void* y;               // (rows, D) contiguous
  void* new_residual;    // (rows, D) contiguous, or null
  int64_t x_row_stride;
  int64_t residual_row_stride;
};

struct RmsNormBackward {
  Dtype dtype;
  Variant variant;
  float eps;
  int64_t size;               // D
  const void* grad_output;    // (rows, D)
  const void* x;              // (rows, D)
  const void* weight;         // (D,)
  const void* grad_residual;  // (rows, D), or null
  void* grad_x;               // (rows, D) contiguous
  int64_t grad_output_row_stride;
  int64_t x_row_stride;
  int64_t grad_residual_row_stride;
};

// What a thread has summed of the weight's gradient: float32, zero at first, in the order of the kernel's registers.
// Each level holds sums of 16 of the level below, so that the error grows with the logarithm of the rows.
constexpr int kRmsNormPartialLevels = 3;
constexpr int kRmsNormPartialStep = 16;
constexpr int64_t rms_norm_partial_size(int64_t size) { return (size + 31) / 32 * 32 * kRmsNormPartialLevels; }

struct RmsNormKernels {
  void (*forward)(const RmsNormForward& args, int64_t begin, int64_t end);
  void (*backward)(const RmsNormBackward& args, int64_t begin, int64_t end, float* partial);  // partial may be null
  void (*sum_partials)(Dtype dtype, int64_t size, const float* partials, int64_t count, void* grad_weight);
};

template <CpuLevel level>
RmsNormKernels rms_norm_kernels();

}  // namespace vlmfast
