// The interface of the CPU kernel that moves rows; row_moves.h calls it.
#pragma once

#include "common/types.h"

namespace vlmfast {

// Consecutive output rows. Each is zeros, a copy of one row times a factor, or the sum of two rows.
struct RowSums {
  int64_t size;               // elements of a row
  const char* const* copied;  // (rows,): null for zeros
  const char* const* added;   // (rows,): null for no second row, which needs a first; or null if no row has one
  float factor;               // applied to rows without a second row
  char* y;                    // (rows, size) contiguous
};

struct RowMovesKernels {
  // The second one uses non-temporal stores, which need rows of y that begin at multiples of 64 bytes.
  ByDtype<void(const RowSums& args, int64_t begin, int64_t end)> write_rows[2];
};

}  // namespace vlmfast
