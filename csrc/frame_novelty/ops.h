// The arguments and schemas of the novelty ops. vlmfast/ops/frame_novelty/definition.py defines what is computed.
#pragma once

#include <algorithm>

#include "common/common.h"

namespace vlmfast {

struct FrameArguments {
  Size batch{"batch"}, frames{"frames"}, tokens = Size("tokens").at_least(1);
  Size hidden = Size("hidden").at_most((int64_t{1} << 30) - 1);  // columns are counted in 32 bits
  FloatDtype dtype;
  View<4> rows;

  explicit FrameArguments(const Tensor& tensor) : rows("frames", tensor, {batch, frames, tokens, hidden}, dtype) {}

  // Returns how many frames have a previous frame.
  int64_t changes() const { return std::max<int64_t>(0, frames - 1); }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                            \
  OP(frame_novelty, "(Tensor frames) -> (Tensor, Tensor, Tensor)") \
  OP(frame_change, "(Tensor frames) -> Tensor")
