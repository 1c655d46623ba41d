// Moves of whole rows on the CPU: the torch side of row_moves_kernels.h.
#pragma once

#include "common/cpu.h"
#include "common/row_moves_kernels.h"

namespace vlmfast {

// Outputs of at least this many bytes are written with non-temporal stores, which save reading each line before it is
// written: 4096 x 2048 bfloat16 takes 0.44 ms instead of 0.65 ms (EPYC, 32 MB of L3, one thread). A smaller output
// would still be in the cache when the next op reads it, which is worth more: at 8 MB the writer and the reader
// together take 1.5 times as long with non-temporal stores.
constexpr int64_t kPastCaches = int64_t{12} << 20;

// Returns a new contiguous tensor with the dtype of `like`, whose rows of `row_size` elements are as RowSums describes.
inline Tensor written_rows(IntHeaderOnlyArrayRef sizes, const Tensor& like, int64_t row_size, const char* const* copied,
                           const char* const* added = nullptr, double factor = 1) {
  constexpr int64_t kLine = 64;
  const Dtype dtype = dtype_of(like);
  Tensor output = allocate_output(sizes, like, dtype);
  char* const y = static_cast<char*>(output.mutable_data_ptr());
  const int64_t elements = output.numel(), width = info(dtype).width;
  if (elements == 0) return output;
  const int64_t rows = elements / row_size;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % kLine == 0 && row_size * width % kLine == 0;
  const bool past_caches = aligned && elements * width >= kPastCaches;
  const auto write_rows = kernels<RowMovesKernels>().write_rows[past_caches ? 1 : 0][dtype];
  const RowSums args{row_size, copied, added, static_cast<float>(factor), y};
  parallel_rows(rows, row_ranges(rows, row_size),
                [&](int64_t begin, int64_t end, int64_t) { write_rows(args, begin, end); });
  return output;
}

}  // namespace vlmfast
