// The interface of the CPU kernels of the gated activation; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

struct SiluMulForward {
  int64_t hidden;
  const void* gate;  // (rows, hidden)
  const void* up;    // (rows, hidden)
  void* y;           // (rows, hidden) contiguous
  int64_t gate_row_stride;
  int64_t up_row_stride;
};

struct SiluMulBackward {
  int64_t hidden;
  const void* grad_output;  // (rows, hidden)
  const void* gate;         // (rows, hidden)
  const void* up;           // (rows, hidden)
  void* grad_gate;          // (rows, hidden) contiguous
  void* grad_up;            // (rows, hidden) contiguous
  int64_t grad_output_row_stride;
  int64_t gate_row_stride;
  int64_t up_row_stride;
};

struct SiluMulKernels {
  // Indexed by the activation.
  ByDtype<void(const SiluMulForward& args, int64_t begin, int64_t end)> forward[2];
  ByDtype<void(const SiluMulBackward& args, int64_t begin, int64_t end)> backward[2];
};

}  // namespace vlmfast
