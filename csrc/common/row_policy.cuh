// How rows of a tensor are distributed over groups of threads, as a type, and the loops of a kernel over them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// A row is distributed over kThreadsPerRow threads, each of which keeps kVectors vectors of kVec elements in registers.
template <int kVec_, int kThreadsPerRow_, int kVectors_, int kBlocksPerMultiprocessor_, bool kUnbounded_ = false>
struct RowPolicy {
  static constexpr int kVec = kVec_;
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kThreads = kThreadsPerRow > kWarp ? kThreadsPerRow : 128;  // short rows share a block
  static constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  static constexpr int kStep = kThreadsPerRow * kVec;
  static constexpr int kColumns = kStep * kVectors;  // the longest row that fits in registers
  static constexpr bool kUnbounded = kUnbounded_;    // rows may be longer: the rest is read again for each use
  // For persistent grids: enough rows in flight to hide the latency of memory, without too many partial sums.
  static constexpr int kBlocksPerMultiprocessor = kBlocksPerMultiprocessor_;
  static constexpr int kResident = 768 / kThreads;  // of rms_norm_kernel: 24 KiB in flight of each operand

  __device__ __forceinline__ static int group() { return threadIdx.x / kThreadsPerRow; }  // of the row in the block
  __device__ __forceinline__ static int first() { return threadIdx.x % kThreadsPerRow * kVec; }

  // Returns the number of blocks for `rows` rows, at most `most`.
  static int64_t blocks(int64_t rows, int64_t most) {
    return std::min((rows + kRowsPerBlock - 1) / kRowsPerBlock, most);
  }

  // Returns the number of blocks of a persistent grid. Two rows for each group of threads are in flight at once, and make
  // half as many partial sums as one; but no multiprocessor is left without a block.
  static int64_t persistent_blocks(int64_t rows, int64_t multiprocessors) {
    const int64_t all = blocks(rows, kMaxBlocks);
    const int64_t wanted = std::max((all + 1) / 2, std::min(all, multiprocessors));
    return std::min(wanted, multiprocessors * kBlocksPerMultiprocessor);
  }

  // Calls function(row, end) for the rows of the thread's group, whatever the size of the grid. The groups of a block
  // stay together: one that is past the last row has `end` 0, not `hidden`, and only takes part in the shuffles.
  template <typename Function>
  __device__ __forceinline__ static void for_rows(int64_t rows, int hidden, Function function) {
    const int64_t step = int64_t{gridDim.x} * kRowsPerBlock;
    for (int64_t block_row = int64_t{blockIdx.x} * kRowsPerBlock; block_row < rows; block_row += step) {
      const int64_t row = block_row + group();
      function(row, row < rows ? hidden : 0);
    }
  }

  // Calls function(row, end, kept) as for_rows does, with kept = load(row, end) of the kept vectors. Those of the next
  // row are loaded before the function is called, so that memory is not idle during its reductions; not if `kAhead` is
  // false, for kernels that have no registers for them.
  template <bool kAhead = true, typename Load, typename Function>
  __device__ __forceinline__ static void for_rows_ahead(int64_t rows, int hidden, Load load, Function function) {
    const int64_t step = int64_t{gridDim.x} * kRowsPerBlock;
    const auto end_of = [&](int64_t row) { return row < rows ? hidden : 0; };
    int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + group();
    auto kept = load(row, end_of(row));
    while (row - group() < rows) {
      const int64_t next_row = row + step;
      const auto load_next = [&] { return load(next_row, end_of(next_row)); };
      if constexpr (kAhead) {
        const auto next = load_next();
        function(row, end_of(row), kept);
        kept = next;
      } else {
        function(row, end_of(row), kept);
        kept = load_next();
      }
      row = next_row;
    }
  }

  // Calls function(k, column) for each vector of the row below column `end` that the thread keeps in register k.
  template <typename Function>
  __device__ __forceinline__ static void for_kept(int end, Function function) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = first() + k * kStep;
      if (column < end) function(k, column);
    }
  }

  // Calls function(column) for the thread's vectors beyond those in registers.
  template <typename Function>
  __device__ __forceinline__ static void for_rest(int end, Function function) {
    if constexpr (kUnbounded) {
#pragma unroll 1
      for (int column = first() + kColumns; column < end; column += kStep) function(column);
    }
  }

  // Calls function(values, column) for all vectors of the thread: those in `kept`, then the rest, from load(column).
  template <typename Values, typename Load, typename Function>
  __device__ __forceinline__ static void for_all(int end, const Values (&kept)[kVectors], Load load,
                                                 Function function) {
    for_kept(end, [&](int k, int column) { function(kept[k], column); });
    for_rest(end, [&](int column) { function(load(column), column); });
  }
};

// Policies for rows of hidden states. The comments give the longest row in elements of half precision.
template <int kVec>
using HeadRow = RowPolicy<kVec, 8, 2, 4>;  // 128
template <int kVec>
using NarrowRow = RowPolicy<kVec, 32, 2, 4>;  // 512
template <int kVec>
using MiddleRow = RowPolicy<kVec, 64, 2, 8>;  // 1024
template <int kVec>
using WideRow = RowPolicy<kVec, 128, 2, 4>;  // 2048
template <int kVec>
using HiddenRow = RowPolicy<kVec, 256, 2, 2>;  // 4096
template <int kVec>
using LongRow = RowPolicy<kVec, 512, 2, 1, true>;  // 8192 in registers; longer rows are read again

// Calls function(scalar_t(), policy) with the storage type of a dtype and the first policy whose registers hold a row
// of `hidden` elements, in vectors of 16 bytes or element by element.
template <template <int> class... Policies, typename Function>
void with_row_policy(Dtype dtype, int64_t hidden, bool in_vectors, Function&& function) {
  const auto choose = [&](auto zero) {
    bool chosen = false;
    const auto offer = [&](auto policy) {
      using Policy = decltype(policy);
      if (chosen || (hidden > Policy::kColumns && !Policy::kUnbounded)) return;
      chosen = true;
      function(zero, policy);
    };
    if (in_vectors) {
      (offer(Policies<kVectorBytes / sizeof(zero)>()), ...);
    } else {
      (offer(Policies<1>()), ...);
    }
  };
  with_dtype(dtype, choose);
}

// Calls function(scalar_t(), policy) as above, for rows of hidden states.
template <typename Function>
void with_hidden_row_policy(Dtype dtype, int64_t hidden, bool in_vectors, Function&& function) {
  with_row_policy<HeadRow, NarrowRow, MiddleRow, WideRow, HiddenRow, LongRow>(dtype, hidden, in_vectors, function);
}

}  // namespace vlmfast
