// The launch policy of kernels that give each row of a tensor to a group of threads, as types.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// How a row is spread: over kThreadsPerRow threads, each with kVectors vectors of kVec elements in its registers.
template <int kVec_, int kThreadsPerRow_, int kVectors_, int kBlocksPerMultiprocessor_, bool kUnbounded_ = false>
struct RowPolicy {
  static constexpr int kVec = kVec_;
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kVectors = kVectors_;
  static constexpr int kThreads = kThreadsPerRow > kWarp ? kThreadsPerRow : 128;  // a warp's rows share a block
  static constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  static constexpr int kStep = kThreadsPerRow * kVec;
  static constexpr int kColumns = kStep * kVectors;  // the longest row that registers hold
  static constexpr bool kUnbounded = kUnbounded_;    // longer ones too: what is beyond is read twice
  // Of the persistent backward: enough rows in flight to cover the latency of memory, few enough partial sums.
  static constexpr int kBlocksPerMultiprocessor = kBlocksPerMultiprocessor_;

  __device__ __forceinline__ static int group() { return threadIdx.x / kThreadsPerRow; }  // the row within the block
  __device__ __forceinline__ static int first() { return threadIdx.x % kThreadsPerRow * kVec; }

  // function(k, column) for the vectors of a row that the thread keeps, at place k.
  template <typename Function>
  __device__ __forceinline__ static void for_kept(int end, Function function) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int column = first() + k * kStep;
      if (column < end) function(k, column);
    }
  }

  // function(column) for those that it has no room for.
  template <typename Function>
  __device__ __forceinline__ static void for_rest(int end, Function function) {
    if constexpr (kUnbounded) {
#pragma unroll 1
      for (int column = first() + kColumns; column < end; column += kStep) function(column);
    }
  }
};

// function(policy) for rows of `columns` elements, in vectors of kVec.
template <int kVec, typename Function>
void with_row_policy_of(int64_t columns, Function&& function) {
  using HeadRow = RowPolicy<kVec, 8, 2, 5>;          // up to 128 elements in half precision
  using NarrowRow = RowPolicy<kVec, 32, 2, 5>;       // 512
  using MiddleRow = RowPolicy<kVec, 64, 2, 8>;       // 1024
  using HiddenRow = RowPolicy<kVec, 256, 2, 2>;      // 4096
  using LongRow = RowPolicy<kVec, 512, 2, 1, true>;  // 8192 and more
  if (columns <= HeadRow::kColumns) return function(HeadRow());
  if (columns <= NarrowRow::kColumns) return function(NarrowRow());
  if (columns <= MiddleRow::kColumns) return function(MiddleRow());
  if (columns <= HiddenRow::kColumns) return function(HiddenRow());
  return function(LongRow());
}

// function(policy) for rows of `columns` elements: in vectors of 16 bytes where all operands allow it, else one by one.
template <typename scalar_t, typename Function>
void with_row_policy(int64_t columns, std::initializer_list<RowPointer<scalar_t>> operands, Function&& function) {
  if (!vectors_fit(kVectorBytes, columns, operands)) return with_row_policy_of<1>(columns, function);
  return with_row_policy_of<kVectorBytes / sizeof(scalar_t)>(columns, function);
}

// Blocks for that many rows, at most so many.
template <typename Policy>
int64_t row_blocks(int64_t rows, int64_t most) {
  return std::min((rows + Policy::kRowsPerBlock - 1) / Policy::kRowsPerBlock, most);
}

}  // namespace vlmfast
