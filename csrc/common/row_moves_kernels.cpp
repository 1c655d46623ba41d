// Moves of rows on the CPU, compiled once per instruction set (see types.h). All instruction sets give the same bits.
#include "common/row_moves_kernels.h"

#include <cstring>

#include "common/vector.h"

namespace vlmfast {
namespace {

template <class T, bool past_caches>
VLMFAST_INLINE void write(T* to, const T* block, Whole) {
  if constexpr (past_caches) {
#pragma GCC unroll 8
    for (int offset = 0; offset < kBlock; offset += kRegisterBytes / sizeof(T)) {
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

// Rows are prefetched two ahead, because the hardware prefetcher stops at the end of a 4 kB page. With non-temporal
// stores 4096 x 2048 bfloat16 then takes 620 us instead of 720 us (EPYC, one thread); one row ahead gains nothing. With
// ordinary stores the sources of such a smaller output are in the caches already, and prefetching slows 512 rows of 4
// kB from 52 us to 68 us. Whole rows are not copied by memcpy: from 2 kB on glibc chooses `rep movsb`, which on Zen 3
// takes 4 times as long if the destination lies 2 or 16 bytes behind the source within a page.
constexpr int64_t kRowsAhead = 2;

template <class T, bool past_caches>
void write_rows(const RowSums& args, int64_t begin, int64_t end) {
  const T zeros[kBlock] = {};
  const float factor = args.factor;  // copied, because the compiler must assume that stores alias `args`
  for (int64_t row = begin; row < end; ++row) {
    const int64_t later = row + kRowsAhead < end ? row + kRowsAhead : row;
    const auto at = [&](const char* const* sources, int64_t index) {
      return sources == nullptr ? nullptr : reinterpret_cast<const T*>(sources[index]);
    };
    const T *copied = at(args.copied, row), *later_copied = at(args.copied, later);
    const T *added = at(args.added, row), *later_added = at(args.added, later);
    T* y = reinterpret_cast<T*>(args.y) + row * args.size;
    const auto fetch = VLMFAST_LAMBDA(int64_t offset) {
      if (later_copied != nullptr) __builtin_prefetch(later_copied + offset);
      if (later_added != nullptr) __builtin_prefetch(later_added + offset);
    };
    // The kind of a row is tested outside the loop over its blocks: inside, the tests cost as much as the moves.
    const auto each = VLMFAST_LAMBDA(const auto& write_block) {
      each_block(args.size, VLMFAST_LAMBDA(int64_t offset, auto count) {
        if (past_caches) fetch(offset);
        write_block(offset, count);
      });
    };
    if (copied == nullptr) {
      each(VLMFAST_LAMBDA(int64_t offset, auto count) { write<T, past_caches>(y + offset, zeros, count); });
    } else if (added != nullptr) {
      each(VLMFAST_LAMBDA(int64_t offset, auto count) {
        T sum[kBlock];
        store(sum, load(copied + offset, count) + load(added + offset, count));
        write<T, past_caches>(y + offset, sum, count);
      });
    } else if (factor != 1) {
      each(VLMFAST_LAMBDA(int64_t offset, auto count) {
        T scaled[kBlock];
        store(scaled, load(copied + offset, count) * factor);
        write<T, past_caches>(y + offset, scaled, count);
      });
    } else {
      each(VLMFAST_LAMBDA(int64_t offset, auto count) { write<T, past_caches>(y + offset, copied + offset, count); });
    }
  }
  if (past_caches) finish_streams();
}

}  // namespace

template <>
RowMovesKernels kernels_at<RowMovesKernels, CpuLevel::VLMFAST_ISA>() {
  return {{VLMFAST_BY_DTYPE(write_rows, false), VLMFAST_BY_DTYPE(write_rows, true)}};
}

}  // namespace vlmfast
