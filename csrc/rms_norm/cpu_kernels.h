// The CPU kernels of RMSNorm, as rms_norm.cpp calls them.
#pragma once

#include <cstdint>

#include "common/types.h"

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

struct RmsNormKernels {
  void (*forward)(const RmsNormForward& args, int64_t begin, int64_t end);
  void (*backward)(const RmsNormBackward& args, int64_t begin, int64_t end,
                   float* partial);  // partial: see types.h; or null
  void (*sum_partials)(Dtype dtype, int64_t size, const float* partials, int64_t count, void* grad_weight);
};

template <CpuLevel level>
RmsNormKernels rms_norm_kernels();

}  // namespace vlmfast
