// Rows that are moved, on the CPU: the torch side of row_moves_kernels.h.
#pragma once

#include "common.h"
#include "cpu.h"
#include "row_moves_kernels.h"

namespace vlmfast {

// From here on an output is written past the caches, which spares reading it first: 4096 x 2048 bfloat16 then take 0.44
// ms instead of 0.65 (EPYC, 32 MB of L3, one thread). A smaller one would still be in the cache when the next op reads
// it, and that loses more than the writer gains: at 8 MB the two together take 1.5 times as long.
constexpr int64_t kPastCaches = int64_t{12} << 20;

// A fresh contiguous tensor of the dtype of `like` whose rows of `row_size` elements are what `RowSums` says.
inline Tensor written_rows(const int64_t* sizes, int64_t dims, const Tensor& like, int64_t row_size,
                           const char* const* copied, const char* const* added = nullptr, double factor = 1) {
  static const RowMovesKernels kernels = at_cpu_level([](auto level) { return row_moves_kernels<level>(); });
  constexpr int64_t kLine = 64;
  Tensor output = allocate_output(sizes, dims, like);
  char* const y = static_cast<char*>(output.mutable_data_ptr());
  const int64_t elements = output.numel(), width = output.element_size();
  if (elements == 0) return output;
  const int64_t rows = elements / row_size;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % kLine == 0 && row_size * width % kLine == 0;
  const RowSums args{dtype_of(output),
                     row_size,
                     copied,
                     added,
                     static_cast<float>(factor),
                     y,
                     aligned && elements * width >= kPastCaches};
  parallel_rows(rows, row_ranges(rows, row_size),
                [&](int64_t begin, int64_t end, int64_t) { kernels.write_rows(args, begin, end); });
  return output;
}

}  // namespace vlmfast
