// Tiles of query @ key^T for kernels that reduce an attention map without storing it. A block keeps its own rows and
// streams the rows of the other operand. Half precision uses tensor cores, float32 and long heads use FMAs.
#pragma once

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// The rows of one head: `count` rows of head_dim elements.
template <typename scalar_t>
struct TileRows {
  Input<scalar_t, 2> rows;
  int count, head_dim;
};

// Logits on tensor cores. A warp keeps kOwnTiles tiles of 16 rows in registers, as the first operand of each mma. Rows
// have up to kSteps * 16 elements and are padded with zeros; loads have kVec elements. Both operands are permuted along
// the depth in the same way, such that the four elements of a row that a thread needs are adjacent.
template <typename scalar_t_, int kSteps, int kVec>
struct TensorTiles {
  using scalar_t = scalar_t_;
  using Vec = Vector<scalar_t, kVec>;
  static constexpr int kThreads = 128, kWarps = kThreads / kWarp, kOwnTiles = 2;
  static constexpr int kOwnRows = kWarps * kOwnTiles * 16, kColumns = 64;  // rows of a block, columns of a tile
  static constexpr int kRows = 2 * kOwnTiles, kPartColumns = 8;            // of a thread, per part of a tile
  static constexpr int kLanes = 4;                                         // lanes that share a row
  static constexpr int kDepth = kSteps * 16;
  // The distance of rows in shared memory: an odd multiple of 16 elements (32 bytes), so that 8-byte loads from four
  // adjacent rows have no bank conflicts.
  static constexpr int kPitch = kDepth + (kSteps % 2 == 0 ? 16 : 0);
  static constexpr bool kAhead = kVec > 1;  // prefetch the next tile into registers, if the vectors are wide and so few
  static constexpr int kLoads = kColumns * kDepth / kVec / kThreads;

  struct Shared {
    alignas(kVectorBytes) scalar_t tiles[2][kColumns][kPitch];
  };

  Shared& shared;
  unsigned own[kOwnTiles][kSteps][4];
  Vec ahead[kAhead ? kLoads : 1];

  __device__ __forceinline__ explicit TensorTiles(Shared& shared) : shared(shared) {}

  // Return the index of the thread's r-th row in the block, and of its c-th column of a part in the tile.
  __device__ __forceinline__ static int row(int r) {
    const int lane = threadIdx.x % kWarp;
    return threadIdx.x / kWarp * (kOwnTiles * 16) + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  __device__ __forceinline__ static int column(int part, int c) {
    return part * (kPartColumns * kLanes) + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
  }

  // Calls function(load, row, depth) for the vectors of a tile that the thread loads.
  template <typename Function>
  __device__ __forceinline__ static void for_loads(Function function) {
    constexpr int kUnrolled = kAhead ? kLoads : 4;
#pragma unroll(kUnrolled)
    for (int load = 0; load < kLoads; ++load) {
      const int vector = load * kThreads + threadIdx.x;
      function(load, vector / (kDepth / kVec), vector % (kDepth / kVec) * kVec);
    }
  }
  __device__ __forceinline__ static Vec load(const TileRows<scalar_t>& from, int row, int depth) {
    if (row < from.count && depth < from.head_dim) return Vec::load(from.rows.at(row) + depth);
    return Vec{};
  }

  // Loads the block's own rows, from `first` on, into registers.
  __device__ __forceinline__ void keep(const TileRows<scalar_t>& from, int first) {
    static_assert(kOwnRows == 2 * kColumns, "the block's rows fill both tiles");
    __syncthreads();  // all threads are done with the previous tiles
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      for_loads([&](int, int row, int depth) {
        load(from, first + tile * kColumns + row, depth).store(&shared.tiles[tile][row][depth]);
      });
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kOwnTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const scalar_t* const from_row = shared.tiles[0][0] + row(tile * 2 + half) * kPitch;
          const uint2 pair = *reinterpret_cast<const uint2*>(from_row + step * 16 + threadIdx.x % 4 * 4);
          own[tile][step][half] = pair.x;
          own[tile][step][half + 2] = pair.y;
        }
      }
    }
    __syncthreads();
  }

  // Starts the loads of the tile from row `first` on.
  __device__ __forceinline__ void fetch(const TileRows<scalar_t>& from, int first) {
    if constexpr (kAhead) {
      for_loads([&](int i, int row, int depth) { ahead[i] = load(from, first + row, depth); });
    }
  }

  // Stores that tile to shared memory. The other buffer of the two may still be read by slower threads.
  __device__ __forceinline__ void stage(const TileRows<scalar_t>& from, int first, int buffer) {
    for_loads([&](int i, int row, int depth) {
      scalar_t* const to = &shared.tiles[buffer][row][depth];
      if constexpr (kAhead) {
        ahead[i].store(to);
      } else {
        load(from, first + row, depth).store(to);
      }
    });
    __syncthreads();
  }

  // Computes the staged tile and calls visit(part, logits) for each part of it.
  template <typename Visit>
  __device__ __forceinline__ void multiply(const TileRows<scalar_t>&, const TileRows<scalar_t>&, int, int, int buffer,
                                           Visit visit) {
    constexpr int kParts = kColumns / (kPartColumns * kLanes), kPartTiles = kPartColumns / 2;
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      float sums[kOwnTiles][kPartTiles][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int tile = 0; tile < kPartTiles; ++tile) {
          const int row = (part * kPartTiles + tile) * 8 + lane / 4;
          const uint2 pair = *reinterpret_cast<const uint2*>(&shared.tiles[buffer][row][step * 16 + lane % 4 * 4]);
          const unsigned others[2] = {pair.x, pair.y};
#pragma unroll
          for (int own_tile = 0; own_tile < kOwnTiles; ++own_tile) {
            multiply_tiles<scalar_t>(sums[own_tile][tile], own[own_tile][step], others);
          }
        }
      }
      float logits[kRows][kPartColumns];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kPartColumns; ++c) logits[r][c] = sums[r / 2][c / 2][r % 2 * 2 + c % 2];
      }
      visit(part, logits);
    }
  }
};

// Logits of any dtype and head length by float32 FMAs. Both operands are staged kDepth elements at a time.
template <typename scalar_t_>
struct PlainTiles {
  using scalar_t = scalar_t_;
  static constexpr int kThreads = 256, kOwnRows = 64, kColumns = 64;
  static constexpr int kRows = 4, kPartColumns = 4, kLanes = 16;
  static constexpr int kDepth = 32, kPitch = kDepth + 1;  // odd, so that columns have no bank conflicts

  struct Shared {
    float own[kOwnRows][kPitch], others[kColumns][kPitch];
  };

  Shared& shared;

  __device__ __forceinline__ explicit PlainTiles(Shared& shared) : shared(shared) {}

  __device__ __forceinline__ static int row(int r) { return r * (kOwnRows / kRows) + threadIdx.x / kLanes; }
  __device__ __forceinline__ static int column(int, int c) { return c * kLanes + threadIdx.x % kLanes; }

  __device__ __forceinline__ void keep(const TileRows<scalar_t>&, int) { __syncthreads(); }
  __device__ __forceinline__ void fetch(const TileRows<scalar_t>&, int) {}
  __device__ __forceinline__ void stage(const TileRows<scalar_t>&, int, int) {}

  template <typename Visit>
  __device__ __forceinline__ void multiply(const TileRows<scalar_t>& own, const TileRows<scalar_t>& others,
                                           int own_first, int first, int, Visit visit) {
    const auto copy = [&](const TileRows<scalar_t>& from, int first_row, int first_depth, float (*to)[kPitch]) {
#pragma unroll
      for (int i = threadIdx.x; i < kColumns * kDepth; i += kThreads) {
        const int row = first_row + i / kDepth, depth = first_depth + i % kDepth;
        const bool exists = row < from.count && depth < from.head_dim;
        to[i / kDepth][i % kDepth] = exists ? to_float(from.rows.at(row)[depth]) : 0.f;
      }
    };
    float logits[kRows][kPartColumns] = {};
    for (int first_depth = 0; first_depth < own.head_dim; first_depth += kDepth) {
      __syncthreads();  // all threads are done with the previous elements
      copy(own, own_first, first_depth, shared.own);
      copy(others, first, first_depth, shared.others);
      __syncthreads();
      float sums[kRows][kPartColumns] = {};  // separate sums per part: shorter chains have smaller errors
#pragma unroll 4
      for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kPartColumns; ++c) {
            sums[r][c] += shared.own[row(r)][depth] * shared.others[column(0, c)][depth];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kPartColumns; ++c) logits[r][c] += sums[r][c];
      }
    }
    visit(0, logits);
  }
};

}  // namespace vlmfast
