// The interface of the CPU kernels of the token merge; cpu.cpp calls them. Rows that are only moved use row_moves.h.
#pragma once

#include "common/types.h"

namespace vlmfast {

// The number of rows of doubles in the workspace of `assign`.
constexpr int64_t kMergeRoom = 12;

// Tokens that are each assigned to the most similar target of their sequence.
struct MergeSlots {
  int64_t head_dim;           // elements of a token's metric
  int64_t targets;            // per sequence, at least one
  int64_t joining;            // tokens per sequence that join a target
  const char* const* target;  // (batch * targets,): the metric of each target
  const char* const* joins;   // (batch * joining,): the metric of each joining token
  const int64_t* position;    // (batch * joining,): the index of each joining token in `slots`
  double* panels;             // (batch, packed_targets(targets, head_dim)), see `pack_targets`
  int32_t* slots;
};

// Rows of y. Each merges one row with any number of others; a row without others is copied.
struct MergedRows {
  Merge merge;
  int64_t hidden;
  int64_t rows;
  const char* const* first;   // (rows,)
  const int64_t* joined_end;  // (rows,): the end of each row's range in `joined`, where the range of the next begins
  const char* const* joined;  // the rows that are merged into the first ones, in the order of the rows of y
  char* y;                    // (rows, hidden) contiguous
};

// Rows of y, each a row divided by a number.
struct DividedRows {
  int64_t hidden;
  const char* const* rows;
  const float* divisors;
  char* y;  // contiguous
};

struct TokenMergeKernels {
  // Writes the scores of one row as integers in the same order, with -0 equal to 0. Returns whether no score is NaN.
  ByDtype<bool(const void* scores, int64_t count, uint32_t* keys)> order;
  // Returns how many doubles the packed targets of a sequence take.
  int64_t (*packed_targets)(int64_t targets, int64_t head_dim);
  // Packs the targets of the whole batch.
  ByDtype<void(const MergeSlots& args, int64_t batch)> pack_targets;
  // Assigns the joining tokens from `begin` to `end`, counted over the batch. room: kMergeRoom * head_dim doubles.
  ByDtype<void(const MergeSlots& args, int64_t begin, int64_t end, double* room)> assign;
  // Merges the columns from `begin` to `end` of all rows.
  ByDtype<void(const MergedRows& args, int64_t begin, int64_t end)> merge;
  ByDtype<void(const DividedRows& args, int64_t begin, int64_t end)> divide;
};

}  // namespace vlmfast
