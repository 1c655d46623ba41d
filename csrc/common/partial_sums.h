// The partial sums of a weight's gradient (see types.h). Only csrc/*/*_kernels.cpp may include this header.
#pragma once

#include "common/vector.h"

namespace vlmfast {
namespace {

// Moves full sums of `partial` up the levels, as torch_sum does along a chain. Called after each row, or each kSumStep
// rows, with the number of rows added so far.
VLMFAST_INLINE void carry(float* partial, int64_t size, int64_t rows) {
  const int64_t stride = padded(size);
  for (int level = 1; level < kSumLevels && rows % kSumStep == 0; ++level) {
    float* from = partial + (level - 1) * stride;
    for (int64_t offset = 0; offset < stride; offset += kBlock) {
      store(from + stride + offset, load(from + stride + offset) + load(from + offset));
      store(from + offset, Block{});
    }
    rows /= kSumStep;
  }
}

template <class T>
void sum_partials(int64_t size, const float* partials, int64_t count, void* sums) {
  const int64_t stride = padded(size);
  each_block(size, [&](int64_t offset, auto elements) {
    Block sum = load(partials + offset);
    for (int64_t i = 1; i < count * kSumLevels; ++i) sum = sum + load(partials + i * stride + offset);
    store(static_cast<T*>(sums) + offset, sum, elements);
  });
}

}  // namespace
}  // namespace vlmfast
