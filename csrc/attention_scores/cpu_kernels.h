// The CPU kernels of the attention scores, as attention_scores.cpp calls them.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace vlmfast {

// Rows of D adjacent elements, one for each head and token.
struct HeadRows {
  const void* data;
  int64_t head_stride, token_stride;  // in elements
};

// Buffers hold rows of so many floats, rounded up: a multiple of every level's registers and tiles.
constexpr int64_t kScoreBlock = 32;
constexpr int64_t padded_tokens(int64_t tokens) { return (tokens + kScoreBlock - 1) / kScoreBlock * kScoreBlock; }

// The CLS row of one sequence. Nothing but the scale of the logits is the same for all of them.
struct ClsAttention {
  Dtype dtype;
  float scale;
  int64_t tokens;  // T
  int64_t size;    // D
  HeadRows query;  // of the CLS token; its token_stride is not used
  HeadRows key;
  float* weights;  // (H, padded_tokens(T)): the softmax of each head
};

struct ReceivedAttention {
  Dtype dtype;
  float scale;
  int64_t size;  // D
  HeadRows query, key;
};

// What some queries of one head pay to the keys of their segment.
struct AttentionPart {
  int64_t head;
  int64_t begin, end;           // the tokens of the segment
  int64_t first_row, last_row;  // the queries among them
  float* sums;                  // (padded_tokens(end - begin),): over these queries
};

struct AttentionScoresKernels {
  // query: room for the heads' queries, (end - begin) * padded_tokens(D).
  void (*cls)(const ClsAttention& args, int64_t begin, int64_t end, float* query);
  // workspace: at a multiple of 64 bytes, as many floats as `received_workspace` says of the longest segment.
  void (*received)(const ReceivedAttention& args, const AttentionPart* parts, int64_t count, float* workspace);
  int64_t (*received_workspace)(int64_t size, int64_t longest);
};

template <CpuLevel level>
AttentionScoresKernels attention_scores_kernels();

}  // namespace vlmfast
