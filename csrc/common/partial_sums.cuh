// Weight gradients: deterministic sums over rows. Each block of a persistent grid writes its part to one row of float32
// partial sums, and a second kernel adds up these rows.
#pragma once

#include "common/row_policy.cuh"

namespace vlmfast {

// Zeroes the columns that do not fit in registers. One thread of the block owns each of them and accumulates in memory.
template <typename Policy>
__device__ __forceinline__ void clear_rest(float* __restrict__ partial, int hidden) {
  Policy::for_rest(hidden, [&](int column) {
#pragma unroll
    for (int i = 0; i < Policy::kVec; ++i) partial[column + i] = 0.f;
  });
}

// Stores the sums of a block, added over the groups of threads that take its rows.
template <typename Policy>
__device__ __forceinline__ void store_partial(const float (&sums)[Policy::kVectors][Policy::kVec],
                                              float* __restrict__ partial, int hidden) {
  if constexpr (Policy::kRowsPerBlock == 1) {
    Policy::for_kept(hidden, [&](int k, int column) {
#pragma unroll
      for (int i = 0; i < Policy::kVec; ++i) partial[column + i] = sums[k][i];
    });
  } else {
    __shared__ float group_partials[Policy::kRowsPerBlock][Policy::kColumns];
    Policy::for_kept(hidden, [&](int k, int column) {
#pragma unroll
      for (int i = 0; i < Policy::kVec; ++i) group_partials[Policy::group()][column + i] = sums[k][i];
    });
    __syncthreads();
    for (int column = threadIdx.x; column < hidden; column += Policy::kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int group = 0; group < Policy::kRowsPerBlock; ++group) sum += group_partials[group][column];
      partial[column] = sum;
    }
  }
}

constexpr int kSumWarps = 32;

// Adds up the rows of partial sums. A block takes kWarp columns of one sum; each of its warps takes every kSumWarps-th
// row.
//
// Limited (sum_partials_kernel): of the two weights of heads of 128 there are eight blocks
template <typename scalar_t>
__global__ void __launch_bounds__(kWarp* kSumWarps)
    sum_partials_kernel(const float* __restrict__ partials,  // (blocks, gridDim.y, hidden)
                        scalar_t* __restrict__ first,        // (hidden,)
                        scalar_t* __restrict__ second,       // (hidden,), or null where gridDim.y is 1
                        int blocks, int hidden) {
  __shared__ float warp_sums[kSumWarps][kWarp];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int column = blockIdx.x * kWarp + lane;
  const int64_t row_step = int64_t{gridDim.y} * hidden;
  const float* const own = partials + int64_t{blockIdx.y} * hidden + column;
  float sum = 0.f;
  if (column < hidden) {
    for (int block = warp; block < blocks; block += kSumWarps) sum += own[block * row_step];
  }
  warp_sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < hidden) {
    sum = 0.f;
#pragma unroll
    for (int other = 0; other < kSumWarps; ++other) sum += warp_sums[other][lane];
    (blockIdx.y == 0 ? first : second)[column] = from_float<scalar_t>(sum);
  }
}

template <typename scalar_t>
void launch_sum_partials(const DeviceScope& scope, const float* partials, int64_t blocks, int64_t hidden,
                         scalar_t* first, scalar_t* second = nullptr) {
  const dim3 grid((hidden + kWarp - 1) / kWarp, second == nullptr ? 1 : 2);
  check_cuda(launch(sum_partials_kernel<scalar_t>, grid, dim3(kWarp, kSumWarps), 0, scope.stream(), partials, first,
                    second, blocks, hidden));
}

}  // namespace vlmfast
