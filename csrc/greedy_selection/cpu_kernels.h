// The CPU kernels of the greedy choices, as cpu.cpp calls them.
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
  int64_t count, columns;  // panels, and tokens in each: the last ones of the last panel are none
  float* elements;         // (count, size, columns)
  float* inverse;          // (count * columns,): 1 / |row|, 0 of one without a direction and of no token
};

struct GreedySelectionKernels {
  int64_t panel_columns;
  int64_t tile_rows;  // tokens that `cosines` compares with a panel at a time
  // Writes a row of (B, N) as float32; returns whether all of it are finite and not negative.
  ByDtype<bool(const void* weights, int64_t count, float* to)> widen;
  // Packs the tokens of some panels.
  ByDtype<void(const TokenRows& rows, const TokenPanels& panels, int64_t begin, int64_t end)> pack_panels;
  // Packs up to tile_rows tokens, (size, tile_rows).
  ByDtype<void(const TokenRows& rows, const int32_t* tokens, int64_t count, float* to)> pack_tile;
  // Compares them with the tokens of some panels: to[i] is the row of token i, count * columns cosines.
  void (*cosines)(const TokenPanels& panels, int64_t size, const float* tile, const int32_t* tokens, int64_t count,
                  int64_t begin, int64_t end, float* const* to);
  // Takes off, from what is left of each token, the part that it shares with a chosen one and with none of those before
  // it. Of these there are `step`, and the parts that tokens share with them are rows of `shares`; so will be these. Less
  // than `least` is nothing.
  void (*take_off)(const float* cosines, int64_t best, int64_t step, int64_t tokens, float least, float* shares,
                   float* left);
  // Adds up, times their weights, how much better a token's similarities would cover the rows. What is covered better
  // already adds no more, to the last bit: the sum is in one order.
  ByDtype<float(const void* similarity, int64_t rows, const float* covered, const float* weights)> gain;
  // Covers the rows by the similarities of a token.
  ByDtype<void(const void* similarity, int64_t rows, float* covered)> cover;
};

}  // namespace vlmfast
