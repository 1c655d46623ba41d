// The CPU kernels of the token merge, as cpu.cpp calls them; rows that are only moved go through row_moves.h.
#pragma once

#include "common/types.h"

namespace vlmfast {

// How many rows of doubles `assign` has room for.
constexpr int64_t kMergeRoom = 12;

// Tokens, each to be merged into the most similar target of its sequence.
struct MergeSlots {
  int64_t head_dim;           // elements of a token's metric
  int64_t targets;            // of each sequence, at least one
  int64_t joining;            // of each sequence: tokens that join a target
  const char* const* target;  // (batch * targets,): where the metric of each begins
  const char* const* joins;   // (batch * joining,)
  const int64_t* position;    // (batch * joining,): which of `slots` is whose
  double* panels;             // (batch, packed_targets(targets, head_dim)), see `pack_targets`
  int32_t* slots;
};

// Rows of y, each the merging of one row with any number of others: the first alone is copied.
struct MergedRows {
  Merge merge;
  int64_t hidden;
  int64_t rows;
  const char* const* first;   // (rows,)
  const int64_t* joined_end;  // (rows,): how many of `joined` belong to the rows up to this one
  const char* const* joined;
  char* y;  // (rows, hidden) contiguous
};

// Rows of y, each the quotient of a row and a number.
struct DividedRows {
  int64_t hidden;
  const char* const* rows;
  const float* divisors;
  char* y;  // contiguous
};

struct TokenMergeKernels {
  // Writes the scores of one row as integers of the same order, -0 like 0; returns whether none of them is NaN.
  ByDtype<bool(const void* scores, int64_t count, uint32_t* keys)> order;
  // How many doubles the targets of a sequence take, packed.
  int64_t (*packed_targets)(int64_t targets, int64_t head_dim);
  // Packs the targets of the whole batch.
  ByDtype<void(const MergeSlots& args, int64_t batch)> pack_targets;
  // Assigns the joining tokens from `begin` to `end` of the whole batch. room: kMergeRoom * head_dim doubles.
  ByDtype<void(const MergeSlots& args, int64_t begin, int64_t end, double* room)> assign;
  // Merges the columns from `begin` to `end` of all rows.
  ByDtype<void(const MergedRows& args, int64_t begin, int64_t end)> merge;
  ByDtype<void(const DividedRows& args, int64_t begin, int64_t end)> divide;
};

}  // namespace vlmfast
