// The op as torch sees it.
#pragma once

#include "common/common.h"

namespace vlmfast {

struct ScaleArguments {
  Size batch{"batch"}, hidden{"hidden"};
  FloatDtype dtype;
  View<2> x;
  View<1> factors;

  ScaleArguments(const Tensor& x_tensor, const Tensor& factors_tensor)
      : x("x", x_tensor, {batch, hidden}, dtype), factors("factors", factors_tensor, {batch}, dtype) {}
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP) OP(scale_rows, "(Tensor x, Tensor factors) -> Tensor")
