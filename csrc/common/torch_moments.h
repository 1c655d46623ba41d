// The mean and variance of rows, bit-identical to those of torch's layer_norm on x86-64 processors with AVX2
// (aten/src/ATen/native/cpu/moments_utils.h, which has vectors of 8 lanes on every machine). Only csrc/*/*_kernels.cpp
// may include this header.
//
// Welford's recurrence runs along chunks of 16 vectors; the moments of the chunks are then merged pairwise, as a binary
// tree. For 16-bit types a vector has 16 elements, which count as two steps of the 8 lanes.
#pragma once

#include "common/vector.h"

namespace vlmfast {
namespace {

constexpr int kMomentLanes = 8;
constexpr int kMomentSteps = 16;

// One of torch's vectors of T, in memory order.
template <class T>
struct MomentVector {
  static constexpr int kElements = sizeof(T) == sizeof(float) ? kMomentLanes : 2 * kMomentLanes;
  static constexpr int kWidth = kLanes < kElements ? kLanes : kElements;
  static constexpr int kCount = kElements / kWidth;
  typedef float Register __attribute__((vector_size(kWidth * sizeof(float))));

  static VLMFAST_INLINE Register load(const T* from) {
    if constexpr (sizeof(T) == sizeof(float)) {
      return load_unaligned<Register>(from);
    } else {
      return load_in_order(from);
    }
  }
};

VLMFAST_INLINE float widened(float value) { return value; }
VLMFAST_INLINE float widened(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
VLMFAST_INLINE float widened(Float16 value) { return load(&value, 1).part[0][0]; }

// The moments of each lane: the number of elements, their mean, and the sum of their squared deviations from it.
struct Moments {
  int64_t count;
  float mean[kMomentLanes];
  float squares[kMomentLanes];

  VLMFAST_INLINE void merge(int64_t other_count, const float* other_mean, const float* other_squares) {
    const int64_t both = count + other_count;
    const float share = both == 0 ? 0.0f : static_cast<float>(other_count) / static_cast<float>(both);
    const float before = static_cast<float>(count);
    for (int lane = 0; lane < kMomentLanes; ++lane) {
      const float delta = other_mean[lane] - mean[lane];
      const float step = share * delta;
      squares[lane] = __builtin_fmaf(delta * before, step, squares[lane] + other_squares[lane]);
      mean[lane] = mean[lane] + step;
    }
    count = both;
  }
  VLMFAST_INLINE void merge(const Moments& other) { merge(other.count, other.mean, other.squares); }
};

struct MeanAndVariance {
  float mean, variance;
};

// Merges the moments of all lanes with those of the last `rest` elements, which fill no vector.
template <class T>
VLMFAST_INLINE MeanAndVariance of_lanes(const Moments& lanes, const T* last, int64_t rest, int64_t size) {
  int64_t count = 0;
  float mean = 0, squares = 0;
  for (; count < rest; ++count) {
    const float value = widened(last[count]), delta = value - mean;
    mean += delta / static_cast<float>(count + 1);
    squares += delta * (value - mean);
  }
  for (int lane = 0; lane < kMomentLanes; ++lane) {
    const int64_t both = count + lanes.count;
    const float share = both == 0 ? 0.0f : static_cast<float>(lanes.count) / static_cast<float>(both);
    const float delta = lanes.mean[lane] - mean;
    mean = __builtin_fmaf(share, delta, mean);
    squares += __builtin_fmaf(delta * delta * share, static_cast<float>(count), lanes.squares[lane]);
    count = both;
  }
  return {mean, squares / static_cast<float>(size)};
}

// Adds the moments of up to kMomentSteps vectors of each of N rows to `lanes`.
template <class T, int N>
VLMFAST_INLINE void add_steps(const T* x, int64_t row_stride, int64_t steps, Moments (&lanes)[N]) {
  using Vector = MomentVector<T>;
  using Register = typename Vector::Register;
  Register mean[N][Vector::kCount] = {}, squares[N][Vector::kCount] = {};
#pragma GCC unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    const Register share = Register{} + 1.0f / static_cast<float>(step + 1);
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      VLMFAST_UNROLL
      for (int i = 0; i < Vector::kCount; ++i) {
        const Register value = Vector::load(x + n * row_stride + step * Vector::kElements + i * Vector::kWidth);
        const Register delta = value - mean[n][i];
        mean[n][i] = fused(delta, share, mean[n][i]);
        squares[n][i] = fused(delta, value - mean[n][i], squares[n][i]);
      }
    }
  }
  VLMFAST_UNROLL
  for (int n = 0; n < N; ++n) {
    float means[Vector::kElements], sums[Vector::kElements];
    std::memcpy(means, mean[n], sizeof(means));
    std::memcpy(sums, squares[n], sizeof(sums));
    for (int first = 0; first < Vector::kElements; first += kMomentLanes) {
      lanes[n].merge(steps, means + first, sums + first);
    }
  }
}

// Computes the mean and variance of N rows of `size` elements, which lie row_stride elements apart.
template <class T, int N>
VLMFAST_INLINE void torch_moments(const T* x, int64_t row_stride, int64_t size, MeanAndVariance (&result)[N]) {
  constexpr int kElements = MomentVector<T>::kElements, kMaxLevels = 48;
  const int64_t vectors = size / kElements, chunks = (vectors + kMomentSteps - 1) / kMomentSteps;
  int levels = 0;
  while ((int64_t{1} << levels) < chunks) ++levels;
  Moments level[kMaxLevels][N];
  for (int above = 0; above == 0 || above < levels; ++above) {
    for (int n = 0; n < N; ++n) level[above][n] = {};
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kMomentSteps, left = vectors - first;
    add_steps<T, N>(x + first * kElements, row_stride, left < kMomentSteps ? left : kMomentSteps, level[0]);
    for (int above = 1; above < levels && ((chunk + 1) >> (above - 1)) % 2 == 0; ++above) {
      for (int n = 0; n < N; ++n) {
        level[above][n].merge(level[above - 1][n]);
        level[above - 1][n] = {};
      }
    }
  }
  for (int above = 1; above < levels; ++above) {
    for (int n = 0; n < N; ++n) level[0][n].merge(level[above][n]);
  }
  for (int n = 0; n < N; ++n) {
    const int64_t whole = vectors * kElements;
    result[n] = of_lanes(level[0][n], x + n * row_stride + whole, size - whole, size);
  }
}

}  // namespace
}  // namespace vlmfast
