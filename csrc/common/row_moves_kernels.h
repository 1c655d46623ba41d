// The CPU kernel that moves rows, as row_moves.h calls it.
#pragma once

#include "common/types.h"

namespace vlmfast {

// Rows to be written one after the other: each is a copy of one row, or zeros, plus another row where there is one, or
// times a factor.
struct RowSums {
  int64_t size;               // elements of a row
  const char* const* copied;  // (rows,): null for zeros
  const char* const* added;   // (rows,): null for nothing, then `copied` is not; or null, if no row has one
  float factor;               // of the rows to which nothing is added
  char* y;                    // (rows, size) contiguous
};

struct RowMovesKernels {
  // The second one writes past the caches: rows of y that begin at multiples of 64 bytes.
  ByDtype<void(const RowSums& args, int64_t begin, int64_t end)> write_rows[2];
};

}  // namespace vlmfast
