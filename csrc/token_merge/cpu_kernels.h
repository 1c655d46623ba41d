// The CPU kernels of the token merge, as token_merge.cpp calls them; rows that are only moved go through row_moves.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace vlmfast {

// How many rows of M doubles `assign` has room for.
constexpr int64_t kMergeRoom = 12;

// Tokens that are to be merged into the most similar one of C targets.
struct MergeSlots {
  Dtype dtype;
  int64_t size;               // M
  int64_t targets;            // C, at least one
  int64_t joining;            // J, of each image
  const char* const* target;  // (B * C,): where the metric of each begins
  const char* const* joins;   // (B * J,)
  const int64_t* position;    // (B * J,): which of `slots` is whose
  double* panels;             // (B, packed_targets(C, M)), see `pack_targets`
  int32_t* slots;
};

// Rows of y, each the merging of one row with any number of others: the first alone is copied.
struct MergedRows {
  Dtype dtype;
  Merge merge;
  int64_t size;  // D
  int64_t rows;
  const char* const* first;   // (rows,)
  const int64_t* joined_end;  // (rows,): how many of `joined` belong to the rows up to this one
  const char* const* joined;
  char* y;  // (rows, D) contiguous
};

// Rows of y, each the quotient of a row and a number.
struct DividedRows {
  Dtype dtype;
  int64_t size;
  const char* const* rows;
  const float* divisors;
  char* y;  // contiguous
};

struct TokenMergeKernels {
  // The scores of one row as integers of the same order, -0 like 0; whether there was no NaN among them.
  bool (*order)(Dtype dtype, const void* scores, int64_t count, uint32_t* keys);
  // How many doubles the targets of an image take, and the targets of all images.
  int64_t (*packed_targets)(int64_t targets, int64_t size);
  void (*pack_targets)(const MergeSlots& args, int64_t images);
  // Of the joining tokens from `begin` to `end` of the whole batch. room: kMergeRoom * M doubles.
  void (*assign)(const MergeSlots& args, int64_t begin, int64_t end, double* room);
  // The columns from `begin` to `end` of all rows.
  void (*merge)(const MergedRows& args, int64_t begin, int64_t end);
  void (*divide)(const DividedRows& args, int64_t begin, int64_t end);
};

template <CpuLevel level>
TokenMergeKernels token_merge_kernels();

}  // namespace vlmfast
