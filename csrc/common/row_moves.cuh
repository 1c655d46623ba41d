// Moves whole rows: each output row is a copy of an input row, optionally plus a second one or times a factor.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// The element type of rows that are only copied, whatever their dtype.
using Word = uint16_t;

// Returns the last size of a view, in elements of scalar_t, which may be narrower than those of the view.
template <typename scalar_t, int rank>
int64_t row_size(const View<rank>& view) {
  return view.size(rank - 1) * (view.width() / static_cast<int64_t>(sizeof(scalar_t)));
}

enum class Arithmetic { kNone, kAdd, kMultiply };

// The source and destination of one row.
template <typename scalar_t>
struct Route {
  const scalar_t* from = nullptr;    // null for zeros
  scalar_t* to = nullptr;            // null if the row is not wanted
  const scalar_t* addend = nullptr;  // null for none
  scalar_t* cleared = nullptr;       // another row to fill with zeros, or null
};

// The shape of a block: `along` threads on each of `rows` rows, every thread with up to kVectors vectors in flight.
// There are no barriers, so one kernel serves rows of every length.
struct MovePolicy {
  static constexpr int kThreads = 256, kVectors = 4, kBlocksPerMultiprocessor = 4;
  static constexpr int64_t kSegment = 8;  // threads that cover one 128-byte line
  int64_t along, rows;

  explicit MovePolicy(int64_t vectors) {
    const int64_t threads = (vectors + kVectors - 1) / kVectors;
    along = std::clamp<int64_t>((threads + kSegment - 1) / kSegment * kSegment, kSegment, kThreads);
    rows = kThreads / along;
  }
};

// Moves each row along the Route that move(row) returns.
template <typename scalar_t, int kVec, typename Move>
__global__ void __launch_bounds__(MovePolicy::kThreads, MovePolicy::kBlocksPerMultiprocessor)
    move_rows_kernel(Move move, int64_t rows, int64_t hidden) {
  using Vec = Vector<scalar_t, kVec>;
  const int step = blockDim.x * kVec;
  const int64_t row_step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += row_step) {
    const Route<scalar_t> route = move(row);
    for (int64_t column = threadIdx.x * kVec; column < hidden; column += step * MovePolicy::kVectors) {
      const auto for_vectors = [&](auto function) {
#pragma unroll
        for (int k = 0; k < MovePolicy::kVectors; ++k) {
          if (k * step < hidden - column) function(k, column + k * step);
        }
      };
      if (route.to != nullptr) {
        Vec values[MovePolicy::kVectors] = {};
        if (route.from != nullptr) for_vectors([&](int k, int64_t at) { values[k] = Vec::load(route.from + at); });
        if constexpr (Move::kArithmetic == Arithmetic::kAdd) {
          if (route.addend != nullptr) {
            Vec addends[MovePolicy::kVectors] = {};
            for_vectors([&](int k, int64_t at) { addends[k] = Vec::load(route.addend + at); });
            for_vectors([&](int k, int64_t) { values[k].fill([&](int i) { return values[k][i] + addends[k][i]; }); });
          }
        }
        if constexpr (Move::kArithmetic == Arithmetic::kMultiply) {
          for_vectors([&](int k, int64_t) { values[k].fill([&](int i) { return values[k][i] * move.factor; }); });
        }
        for_vectors([&](int k, int64_t at) { values[k].store(route.to + at); });
      }
      if (route.cleared != nullptr) for_vectors([&](int, int64_t at) { Vec{}.store(route.cleared + at); });
    }
  }
}

// Moves `rows` rows with the widest access that the views that are read allow: 16 bytes, 4 bytes or one element.
// Outputs need no check: they are contiguous, and torch's allocations are aligned.
template <typename scalar_t, typename Move, int... ranks>
void launch_move(const DeviceScope& scope, int64_t rows, const Move& move, const View<ranks>&... views) {
  if (rows == 0) return;
  const auto in_vectors = [&](auto bytes) {
    constexpr int kVec = decltype(bytes)::value / sizeof(scalar_t);
    const MovePolicy policy(move.hidden / kVec);
    launch_blocks(scope, move_rows_kernel<scalar_t, kVec, Move>, (rows + policy.rows - 1) / policy.rows,
                  dim3(policy.along, policy.rows), 0, move, rows, move.hidden);
  };
  const auto fit = [&](int64_t bytes) {
    return move.hidden * sizeof(scalar_t) % bytes == 0 && vectors_fit(bytes, views...);
  };
  if (fit(kVectorBytes)) return in_vectors(std::integral_constant<int, kVectorBytes>());
  if (fit(4)) return in_vectors(std::integral_constant<int, 4>());
  in_vectors(std::integral_constant<int, sizeof(scalar_t)>());
}

}  // namespace vlmfast
