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

// Five bits of each element of an image's tokens, to guess cheaply which of them are alike. `padded` is the number of
// tokens up to a multiple of `sketch_tokens`; those behind the last are 0.
struct TokenSketches {
  int64_t tokens, padded, words;  // a word has four elements
  int32_t* rows;                  // (padded, words), each element in a signed byte
  int32_t* panels;                // (padded / panel_columns, words, panel_columns), each plus 16, without a sign
  int32_t* sums;                  // (padded,): of the elements of each
  float* inverse;                 // (padded,): 1 / |row|, or 0 for padding and rows without a direction
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
  int64_t sketch_tokens, sketch_elements;  // which the numbers of tokens and of elements are padded to multiples of
  // Sketches the tokens of some panels.
  ByDtype<void(const TokenRows& rows, const TokenSketches& sketches, int64_t begin, int64_t end)> sketch;
  // Multiplies the tokens of a panel with all before them, and with each other: guesses is (padded, padded), of which
  // the rows of earlier tokens are written where the columns are those of the panel.
  void (*guess)(const TokenSketches& sketches, int64_t panel, int32_t* guesses);
  // Finds the token that is most like each one by these guesses; of a single token -1.
  void (*likeliest)(const TokenSketches& sketches, int32_t* guesses, int32_t* likeliest);
  // Multiplies two rows. The sum of a and b has the same bits as that of b and a.
  ByDtype<float(const char* row, const char* other, int64_t size)> dot;
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
