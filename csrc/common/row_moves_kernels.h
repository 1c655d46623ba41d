// The CPU kernel that moves rows, as row_moves.h calls it.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace vlmfast {

// Rows to be written one after the other: each is a copy of one row, or zeros, plus another row where there is one, or
// times a factor.
struct RowSums {
  Dtype dtype;
  int64_t size;               // D
  const char* const* copied;  // (rows,): null for zeros
  const char* const* added;   // (rows,): null for nothing, then `copied` is not; or null, if no row has one
  float factor;               // of the rows to which nothing is added
  char* y;                    // (rows, D) contiguous
  bool past_caches;           // then the rows of y begin at multiples of 64 bytes
};

struct RowMovesKernels {
  void (*write_rows)(const RowSums& args, int64_t begin, int64_t end);
};

template <CpuLevel level>
RowMovesKernels row_moves_kernels();

}  // namespace vlmfast
