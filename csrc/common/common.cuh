// Shared by the CUDA kernels: conversions, vectorised loads and stores, sums and counts over the threads of a block.
#pragma once
#include <cstring>
#include <type_traits>

#include "common/cuda_compat.h"
#include "common/types.h"

namespace vlmfast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- conversions: all arithmetic is in float32 ----

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename scalar_t>
__device__ __forceinline__ scalar_t from_float(float value) {
  if constexpr (std::is_same_v<scalar_t, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<scalar_t, float>) return value;
}

// Rounds two values, in half precision by one instruction.
template <typename scalar_t>
__device__ __forceinline__ auto from_floats(float first, float second) {
  if constexpr (std::is_same_v<scalar_t, __half>) return __floats2half2_rn(first, second);
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) return __floats2bfloat162_rn(first, second);
  if constexpr (std::is_same_v<scalar_t, float>) return make_float2(first, second);
}

// ---- vectors ----

// kSize elements in float32, for those that are used more than once: each conversion takes an instruction.
template <int kSize>
struct Floats {
  float values[kSize];

  __device__ __forceinline__ float& operator[](int i) { return values[i]; }
  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

// kSize adjacent elements in their storage type, moved by one load or store.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Vector {
  static constexpr size_t kBytes = sizeof(scalar_t) * kSize;
  using Raw = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 4, unsigned, unsigned short>>;
  static_assert(sizeof(Raw) == kBytes, "a vector has 2, 4 or 16 bytes");
  scalar_t values[kSize];

  __device__ __forceinline__ static Vector load(const scalar_t* from) { return *reinterpret_cast<const Vector*>(from); }
  // Stores through a built-in type of the same size, because nvcc may split the store of a struct into single elements.
  __device__ __forceinline__ void store(scalar_t* to) const {
    Raw raw;
    memcpy(&raw, values, sizeof raw);
    *reinterpret_cast<Raw*>(to) = raw;
  }
  __device__ __forceinline__ float operator[](int i) const { return to_float(values[i]); }

  // Returns the elements as they are, or converted to Floats.
  template <typename Held>
  __device__ __forceinline__ Held as() const {
    if constexpr (std::is_same_v<Held, Vector>) {
      return *this;
    } else {
      Held wide;
#pragma unroll
      for (int i = 0; i < kSize; ++i) wide[i] = to_float(values[i]);
      return wide;
    }
  }

  // Sets each element i to value(i), which may read element i.
  template <typename Value>
  __device__ __forceinline__ void fill(Value value) {
    if constexpr (kSize == 1) {
      values[0] = from_float<scalar_t>(value(0));
    } else {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        const auto pair = from_floats<scalar_t>(value(i), value(i + 1));
        values[i] = pair.x;
        values[i + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ static Vector rounded(const float (&values)[kSize]) {
    Vector vector;
    vector.fill([&](int i) { return values[i]; });
    return vector;
  }
};

// Rounds each of the values.
template <typename scalar_t, int kSize>
__device__ __forceinline__ void round_all(float (&values)[kSize]) {
  const auto rounded = Vector<scalar_t, kSize>::rounded(values);
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = rounded[i];
}

// ---- RMS norms ----

// The variant is a run-time argument: a uniform branch is cheap, and a template argument would triple the kernels.
__device__ __forceinline__ float weight_scale(Variant variant, float weight) {
  return variant == Variant::kGemma ? 1.f + weight : weight;
}

// Rounds normalised values for "llama", as the weight multiplies them.
template <typename scalar_t, int kSize>
__device__ __forceinline__ void round_normed(Variant variant, float (&normed)[kSize]) {
  if (variant == Variant::kLlama) round_all<scalar_t>(normed);
}

// ---- searches, sums and counts ----

// Returns how many indices below `count` satisfy a predicate that holds for a prefix of them, by binary search.
template <typename Satisfy>
__device__ __forceinline__ int count_first(int count, Satisfy satisfy) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (satisfy(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sums over groups of kThreads adjacent threads: a part of a warp, a warp, or the whole block. Lives in shared memory.
template <int kThreads, int kSums>
struct GroupSum {
  static constexpr int kLanes = kThreads < kWarp ? kThreads : kWarp;
  static constexpr int kWarps = kThreads / kLanes;
  float warp_sums[2][kSums][kWarps];

  // Replaces each thread's `sums` by those of its group. `turn` counts the calls: alternating between two buffers saves
  // the barrier between the reads of one call and the writes of the next.
  __device__ __forceinline__ void add_up(float (&sums)[kSums], int turn) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], offset, kLanes);
      }
    }
    if constexpr (kWarps > 1) {
      float (&buffer)[kSums][kWarps] = warp_sums[turn % 2];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (threadIdx.x % kWarp == 0) buffer[i][threadIdx.x / kWarp] = sums[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i] = 0.f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) sums[i] += buffer[i][warp];
      }
    }
  }
};

// Returns the mask of the lanes of the warp below the thread's own.
__device__ __forceinline__ unsigned earlier_lanes() { return (1u << threadIdx.x % kWarp) - 1; }

// Adds up the counts of the warps of a block. Lives in shared memory.
template <int kThreads>
struct BlockCount {
  static constexpr int kWarps = kThreads / kWarp;
  struct Sums {
    int earlier_warps, block;
  };
  int warp_counts[2][kWarps];

  // `turn` counts the calls: alternating between two buffers saves a barrier, as in GroupSum.
  __device__ __forceinline__ Sums add_up(int warp_count, int turn) {
    int (&buffer)[kWarps] = warp_counts[turn % 2];
    static_assert(kWarps <= kWarp, "each lane takes the count of one warp");
    const int own_warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) buffer[own_warp] = warp_count;
    __syncthreads();
    const int count = lane < kWarps ? buffer[lane] : 0;
    return {__reduce_add_sync(kAllLanes, lane < own_warp ? count : 0), __reduce_add_sync(kAllLanes, count)};
  }
};

}  // namespace vlmfast
