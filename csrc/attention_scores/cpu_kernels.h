// The CPU kernels of the attention scores, as cpu.cpp calls them.
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
  int64_t group;      // heads of queries that share a head of keys
  const bool* valid;  // (tokens,): which are seen; none for all
  float* weights;     // (heads, padded(tokens)): the softmax of each head, 0 at what is not seen
};

struct ReceivedAttention {
  float softmax_scale;
  int64_t head_dim;
  HeadRows query, key;
};

// What some queries of one head pay to the keys of their segment.
struct AttentionPart {
  int64_t head;
  int64_t begin, end;           // the tokens of the segment
  int64_t first_row, last_row;  // the queries among them
  float* sums;                  // (padded(end - begin),): over these queries
};

struct AttentionScoresKernels {
  // query: room for the heads' queries, (end - begin) * padded(head_dim).
  ByDtype<void(const RowAttention& args, int64_t begin, int64_t end, float* query)> row;
  // workspace: at a multiple of 64 bytes, as many floats as `received_workspace` says of the longest segment.
  ByDtype<void(const ReceivedAttention& args, const AttentionPart* parts, int64_t count, float* workspace)> received;
  int64_t (*received_workspace)(int64_t head_dim, int64_t longest);
};

}  // namespace vlmfast
