// The interface of the CPU kernels of the greedy choices; cpu.cpp calls them.
#pragma once

#include "common/types.h"

namespace vlmfast {

// The tokens of one image.
struct TokenRows {
  int64_t tokens, size;
  const char* first;
  int64_t stride;  // bytes from a token to the next

  const char* at(int64_t token) const { return first + token * stride; }
};

// All tokens as columns of a matrix multiplication, in panels.
struct TokenPanels {
  int64_t count, columns;  // panels, and tokens in each; the last panel may be padded
  float* elements;         // (count, size, columns)
  float* inverse;          // (count * columns,): 1 / |row|, or 0 for padding and rows without a direction
};

struct GreedySelectionKernels {
  int64_t panel_columns;
  int64_t tile_rows;  // tokens that `cosines` compares with a panel at a time
  // Writes a row of (B, N) as float32; returns whether all weights are finite and not negative.
  ByDtype<bool(const void* weights, int64_t count, float* to)> widen;
  // Packs the tokens of some panels.
  ByDtype<void(const TokenRows& rows, const TokenPanels& panels, int64_t begin, int64_t end)> pack_panels;
  // Packs up to tile_rows tokens, (size, tile_rows).
  ByDtype<void(const TokenRows& rows, const int32_t* tokens, int64_t count, float* to)> pack_tile;
  // Compares them with the tokens of some panels: to[i] is the row of token i, count * columns cosines.
  void (*cosines)(const TokenPanels& panels, int64_t size, const float* tile, const int32_t* tokens, int64_t count,
                  int64_t begin, int64_t end, float* const* to);
  // Takes a step of an incremental Cholesky decomposition: computes row `step` of `shares`, that of a chosen token,
  // from the rows before it, and subtracts the squares from what is left of each token. Less than `least` becomes 0.
  void (*take_off)(const float* cosines, int64_t best, int64_t step, int64_t tokens, float least, float* shares,
                   float* left);
  // Adds up, times the weights of the rows, how much better a token would cover them. The order of the sum is fixed, so
  // that gains never grow, to the last bit.
  ByDtype<float(const void* similarity, int64_t rows, const float* covered, const float* weights)> gain;
  // Adds a token to the cover.
  ByDtype<void(const void* similarity, int64_t rows, float* covered)> cover;
};

}  // namespace vlmfast
