// The rows of the ops on masked rows on the CPU, compiled once per instruction set (see types.h); every one gives the
// same bits.
#include "masked_rows_kernels.h"

#include <cstring>

#include "vector.h"

namespace vlmfast {
namespace {

template <class T, bool past_caches>
VLMFAST_INLINE void write(T* to, const T* block, Whole) {
  if constexpr (past_caches) {
#pragma GCC unroll 8
    for (int offset = 0; offset < kBlock; offset += kVectorBytes / sizeof(T)) {
      stream(to + offset, load_unaligned<Bits>(block + offset));
    }
  } else {
    std::memcpy(to, block, kBlock * sizeof(T));
  }
}
template <class T, bool past_caches>
VLMFAST_INLINE void write(T* to, const T* block, int count) {
  std::memcpy(to, block, count * sizeof(T));
}

template <class T, bool past_caches>
void write_rows(const RowSums& args, int64_t begin, int64_t end) {
  const T zeros[kBlock] = {};
  for (int64_t row = begin; row < end; ++row) {
    const auto at = [&](const char* const* sources) {
      return sources == nullptr ? nullptr : reinterpret_cast<const T*>(sources[row]);
    };
    const T *copied = at(args.copied), *added = at(args.added);
    T* y = reinterpret_cast<T*>(args.y) + row * args.size;
    if (added != nullptr) {
      each_block(args.size, [&](int64_t offset, auto count) VLMFAST_INLINE_LAMBDA {
        T sum[kBlock];
        store(sum, load(copied + offset, count) + load(added + offset, count));
        write<T, past_caches>(y + offset, sum, count);
      });
    } else if (copied != nullptr) {
      each_block(args.size, [&](int64_t offset, auto count)
                                VLMFAST_INLINE_LAMBDA { write<T, past_caches>(y + offset, copied + offset, count); });
    } else {
      each_block(args.size, [&](int64_t offset, auto count)
                                VLMFAST_INLINE_LAMBDA { write<T, past_caches>(y + offset, zeros, count); });
    }
  }
  if (past_caches) finish_streams();
}

void any_write_rows(const RowSums& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    args.past_caches ? write_rows<T, true>(args, begin, end) : write_rows<T, false>(args, begin, end);
  });
}

}  // namespace

template <>
MaskedRowsKernels masked_rows_kernels<CpuLevel::VLMFAST_ISA>() {
  return {any_write_rows};
}

}  // namespace vlmfast
