// Tiles of query @ key^T for kernels that look at an attention map without storing it: the rows of a block stay where
// they are, the others stream past. In half precision on tensor cores, else with plain multiply-adds.
#pragma once

#include "common/common.cuh"
#include "common/cuda_torch.h"

namespace vlmfast {

// Rows of one head, of which those from `count` on do not exist.
template <typename scalar_t>
struct TileRows {
  Input<scalar_t, 2> rows;
  int count, head_dim;
};

// Logits on tensor cores: a warp has kOwnTiles tiles of 16 rows in registers, as the first operand of each matmul.
// Rows of up to kSteps * 16 elements, zeros behind their end; kVec elements to a load. Depths are taken in an order in
// which the four that a thread needs of a row are neighbours: both operands take the same one.
template <typename scalar_t_, int kSteps, int kVec>
struct TensorTiles {
  using scalar_t = scalar_t_;
  using Vec = Vector<scalar_t, kVec>;
  static constexpr int kThreads = 128, kWarps = kThreads / kWarp, kOwnTiles = 2;
  static constexpr int kOwnRows = kWarps * kOwnTiles * 16, kColumns = 64;  // of a block, of a tile
  static constexpr int kRows = 2 * kOwnTiles, kPartColumns = 8;            // of a thread, in one part of a tile
  static constexpr int kLanes = 4;                                         // that share a row
  static constexpr int kDepth = kSteps * 16;
  // Rows whose 8-byte pieces lie in distinct banks for four neighbouring rows: an odd multiple of 16 elements apart.
  static constexpr int kPitch = kDepth + (kSteps % 2 == 0 ? 16 : 0);
  static constexpr bool kAhead = kVec > 1;  // the next tile waits in registers, where vectors are few
  static constexpr int kLoads = kColumns * kDepth / kVec / kThreads;

  struct Shared {
    alignas(kVectorBytes) scalar_t tiles[2][kColumns][kPitch];
  };

  Shared& shared;
  unsigned own[kOwnTiles][kSteps][4];
  Vec ahead[kAhead ? kLoads : 1];

  __device__ __forceinline__ explicit TensorTiles(Shared& shared) : shared(shared) {}

  // Return where in a block this thread's rows are, and in a tile its columns of a part.
  __device__ __forceinline__ static int row(int r) {
    const int lane = threadIdx.x % kWarp;
    return threadIdx.x / kWarp * (kOwnTiles * 16) + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  __device__ __forceinline__ static int column(int part, int c) {
    return part * (kPartColumns * kLanes) + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
  }

  // Calls function(load, row, depth) for the vectors of a tile that are this thread's to move.
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

  // Keeps the block's own rows, from `first` on.
  __device__ __forceinline__ void keep(const TileRows<scalar_t>& from, int first) {
    static_assert(kOwnRows == 2 * kColumns, "the block's rows fill both tiles");
    __syncthreads();  // the rows before these are done
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

  // Begins to fetch the tile from row `first` on.
  __device__ __forceinline__ void fetch(const TileRows<scalar_t>& from, int first) {
    if constexpr (kAhead) {
      for_loads([&](int i, int row, int depth) { ahead[i] = load(from, first + row, depth); });
    }
  }

  // Puts that tile where all threads see it, in the buffer that nobody has read since the last barrier.
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

  // Calls visit(part, logits) for the parts of that tile.
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

// Logits of any dtype and any length by multiply-adds in float32: both operands come by kDepth elements at a time.
template <typename scalar_t_>
struct PlainTiles {
  using scalar_t = scalar_t_;
  static constexpr int kThreads = 256, kOwnRows = 64, kColumns = 64;
  static constexpr int kRows = 4, kPartColumns = 4, kLanes = 16;
  static constexpr int kDepth = 32, kPitch = kDepth + 1;  // an odd number: columns of a tile in distinct banks

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
      __syncthreads();  // the elements before these are done
      copy(own, own_first, first_depth, shared.own);
      copy(others, first, first_depth, shared.others);
      __syncthreads();
      float sums[kRows][kPartColumns] = {};  // on their own: the error grows with the length of a part
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
