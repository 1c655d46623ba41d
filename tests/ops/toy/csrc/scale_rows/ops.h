// The op as torch sees it.
#pragma once

#define VLMFAST_OPS(OP) OP(scale_rows, "(Tensor x, Tensor factors) -> Tensor")
