// Tells which patches of a map make a token.
#pragma once

#include "common/cuda_compat.h"

namespace vlmfast {

// Patches are numbered twice: as they lie in the map, row by row, and in the order of the tokens, those of a token one
// after the other. In 32 bits: each place takes four divisions.
struct PatchMap {
  unsigned patches;                       // of an image
  unsigned width;                         // of the map, in patches
  unsigned scale, per_token, token_line;  // token_line: tokens that follow each other in one row, or column
  bool by_column;

  struct Place {
    unsigned image, patch;  // the patch as it lies in the map
  };

  // Returns where the patch lies whose number in the order of the tokens, counted through the batch, is `ordinal`.
  __device__ __forceinline__ Place place(unsigned ordinal) const {
    const unsigned in_image = ordinal % patches, token = in_image / per_token;
    const unsigned line = token / token_line, along = token % token_line;
    const unsigned row = by_column ? along : line, column = by_column ? line : along;
    return {ordinal / patches, (row * width + column) * scale + step(in_image % per_token)};
  }

  // Returns the distance, in patches, from the first patch of a token to another one of it.
  __device__ __forceinline__ unsigned step(unsigned part) const { return part / scale * width + part % scale; }
};

}  // namespace vlmfast
