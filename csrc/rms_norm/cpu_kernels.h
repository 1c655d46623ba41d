// The interface of the CPU kernels of RMSNorm; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

struct RmsNormForward {
  float eps, weight_offset;  // weight_offset: added to the weight, 1 or -0, which changes no value
  int64_t hidden;
  const void* x;         // (rows, hidden)
  const void* residual;  // (rows, hidden), or null for no addition
  const void* weight;    // (hidden,)
  void* y;               // (rows, hidden) contiguous
  void* new_residual;    // (rows, hidden) contiguous, or null
  int64_t x_row_stride;
  int64_t residual_row_stride;
};

struct RmsNormBackward {
  float eps, weight_offset;
  int64_t hidden;
  const void* grad_output;    // (rows, hidden)
  const void* x;              // (rows, hidden)
  const void* weight;         // (hidden,)
  const void* grad_residual;  // (rows, hidden), or null
  void* grad_x;               // (rows, hidden) contiguous
  int64_t grad_output_row_stride;
  int64_t x_row_stride;
  int64_t grad_residual_row_stride;
};

struct RmsNormKernels {
  // Indexed by whether the weight is float32 while the rows are of 16 bits, whether there is a residual, whether rows
  // are rounded before the weight (which then has no offset), and the dtype of the rows.
  ByDtype<void(const RmsNormForward& args, int64_t begin, int64_t end)> forward[2][2][2];
  // Indexed like `forward`, without the residual. partial: partial sums of the weight's gradient (see types.h), or
  // null.
  ByDtype<void(const RmsNormBackward& args, int64_t begin, int64_t end, float* partial)> backward[2][2];
  ByDtype<SumPartials> sum_partials;  // indexed by the dtype of the weight
};
template <>
inline constexpr bool kHasBf16Level<RmsNormKernels> = true;

}  // namespace vlmfast
