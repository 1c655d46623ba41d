// The interface of the CPU kernels of the attention scores; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// Rows of head_dim adjacent elements, one for each head and token.
struct HeadRows {
  const void* data;
  int64_t head_stride, token_stride;  // in elements
};

// Arguments for the row of one token of one sequence.
struct RowAttention {
  float softmax_scale;
  int64_t tokens, head_dim;
  HeadRows query;  // of the token; its token_stride is not used
  HeadRows key;
  int64_t group;      // query heads per key head
  const bool* valid;  // (tokens,): which tokens are attended to; null for all
  float* weights;     // (heads, padded(tokens)): the softmax of each head, 0 for masked tokens
};

struct ReceivedAttention {
  float softmax_scale;
  int64_t head_dim;
  HeadRows query, key;
};

// The attention that some queries of one head give to the keys of their segment.
struct AttentionPart {
  int64_t head;
  int64_t begin, end;           // the tokens of the segment
  int64_t first_row, last_row;  // the queries among them
  float* sums;                  // (padded(end - begin),): over these queries
};

struct AttentionScoresKernels {
  // query: workspace for the queries of the heads, (end - begin) * padded(head_dim) floats.
  ByDtype<void(const RowAttention& args, int64_t begin, int64_t end, float* query)> row;
  // workspace: aligned to 64 bytes, as many floats as `received_workspace` returns for the longest segment.
  ByDtype<void(const ReceivedAttention& args, const AttentionPart* parts, int64_t count, float* workspace)> received;
  int64_t (*received_workspace)(int64_t head_dim, int64_t longest);
};

}  // namespace vlmfast
