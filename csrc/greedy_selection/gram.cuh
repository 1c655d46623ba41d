// Computes the Gram matrices of the tokens of images, a square of a matrix per block: in half precision on tensor
// cores, in float32 with plain multiply-adds.
#pragma once

#include "greedy_selection/greedy.cuh"

namespace vlmfast {

struct GramPolicy {
  static constexpr int kThreads = 128, kTile = 64;  // a tile: tokens along each side of a square
  int64_t blocks;
  int size, tiles;

  GramPolicy(const Images& images, int64_t size)
      : size(static_cast<int>(size)), tiles((images.longest + kTile - 1) / kTile) {
    blocks = images.count * tiles * tiles;
  }
};

// Computes a square from a part of the elements at a time. Each warp has 16 rows of the square.
template <typename scalar_t_>
struct GramTile {
  using scalar_t = scalar_t_;
  static constexpr int kTile = GramPolicy::kTile, kDepth = 64;
  static constexpr int kPitch =
      kDepth + 8;  // rows begin four banks apart, so that the loads of a warp have no bank conflicts
  alignas(kVectorBytes) scalar_t rows[kTile][kPitch], others[kTile][kPitch];

  __device__ __forceinline__ static unsigned pair(const scalar_t* from) {
    return *reinterpret_cast<const unsigned*>(from);
  }

  __device__ __forceinline__ void multiply(float (&sums)[8][4]) const {
    const int group = threadIdx.x % kWarp / 4, at = threadIdx.x % 4 * 2;
    const int row = threadIdx.x / kWarp * 16 + group;
#pragma unroll
    for (int depth = at; depth < kDepth; depth += 16) {
      const unsigned own[4] = {pair(&rows[row][depth]), pair(&rows[row + 8][depth]), pair(&rows[row][depth + 8]),
                               pair(&rows[row + 8][depth + 8])};
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        const scalar_t* const other = others[tile * 8 + group];
        const unsigned theirs[2] = {pair(other + depth), pair(other + depth + 8)};
        multiply_tiles<scalar_t>(sums[tile], own, theirs);
      }
    }
  }

  __device__ __forceinline__ static int row_of(int, int i) {
    return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + i / 2 * 8;
  }
  __device__ __forceinline__ static int column_of(int tile, int i) { return tile * 8 + threadIdx.x % 4 * 2 + i % 2; }
};

template <>
struct GramTile<float> {
  using scalar_t = float;
  static constexpr int kTile = GramPolicy::kTile, kDepth = 32, kPitch = kDepth + 4;
  alignas(kVectorBytes) float rows[kTile][kPitch], others[kTile][kPitch];

  __device__ __forceinline__ void multiply(float (&sums)[8][4]) const {
    float part[8][4] = {};  // summed by itself, so that the error grows only with the length of a part
#pragma unroll 4
    for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) part[r][c] += rows[row_of(r, c)][depth] * others[column_of(r, c)][depth];
      }
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[r][c] += part[r][c];
    }
  }

  __device__ __forceinline__ static int row_of(int r, int) { return r * 8 + threadIdx.x / 16; }
  __device__ __forceinline__ static int column_of(int, int c) { return c * 16 + threadIdx.x % 16; }
};

// Limited (gram_kernel): multiplies all tokens with all others: of one image there are too few blocks
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(GramPolicy::kThreads)
    gram_kernel(Input<scalar_t, 3> features,   // (batch, tokens, size)
                float* __restrict__ products,  // (batch, tokens, longest)
                Images images, GramPolicy policy) {
  using Tile = GramTile<scalar_t>;
  using Vec = Vector<scalar_t, kVec>;
  VLMFAST_DYNAMIC_SHARED(Tile, shared);
  for (int64_t block = blockIdx.x; block < policy.blocks; block += gridDim.x) {
    const int square = static_cast<int>(block % (int64_t{policy.tiles} * policy.tiles));
    const Image image = images.at(block / (int64_t{policy.tiles} * policy.tiles));
    const int first_row = square / policy.tiles * Tile::kTile, first_other = square % policy.tiles * Tile::kTile;
    if (first_row >= image.tokens || first_other >= image.tokens) continue;  // a shorter image has no such square
    const auto fetch = [&](int first, int first_depth, scalar_t(*to)[Tile::kPitch]) {
#pragma unroll 4
      for (int i = threadIdx.x; i < Tile::kTile * Tile::kDepth / kVec; i += GramPolicy::kThreads) {
        const int row = i / (Tile::kDepth / kVec), depth = i % (Tile::kDepth / kVec) * kVec;
        const bool exists = first + row < image.tokens && first_depth + depth < policy.size;
        (exists ? Vec::load(features.at(image.row, int64_t{image.first} + first + row) + first_depth + depth) : Vec{})
            .store(&to[row][depth]);
      }
    };
    float sums[8][4] = {};
    for (int first_depth = 0; first_depth < policy.size; first_depth += Tile::kDepth) {
      __syncthreads();  // the elements before these have been read
      fetch(first_row, first_depth, shared->rows);
      fetch(first_other, first_depth, shared->others);
      __syncthreads();
      shared->multiply(sums);
    }
    float* const product = products + image.token * images.longest;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = first_row + Tile::row_of(r, c), other = first_other + Tile::column_of(r, c);
        if (row < image.tokens && other < image.tokens) product[int64_t{row} * images.longest + other] = sums[r][c];
      }
    }
  }
}

}  // namespace vlmfast
