// Arithmetic for sums that need not follow torch's order. Only csrc/*/*_kernels.cpp may include this header.
#pragma once

#include <utility>

#include "common/vector.h"

namespace vlmfast {
namespace {

typedef double Double __attribute__((vector_size(kRegisterBytes)));
constexpr int kDoubles = kLanes / 2;  // doubles in a register

// a * b + c, rounded once where the processor has FMA and twice elsewhere.
template <class V>
VLMFAST_INLINE V multiply_add(V a, V b, V c) {
#if defined(__FMA__)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}

VLMFAST_INLINE Block operator/(const Block& a, float b) {
  return each_part([&](int i) { return a.part[i] / b; });
}

// The larger and the smaller of two numbers: b, if one of them is NaN. Where one is constant, GCC makes two instructions
// of the conditional expression.
#if defined(__AVX512F__)
VLMFAST_INLINE Float larger(Float a, Float b) { return (Float)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b); }
VLMFAST_INLINE Float smaller(Float a, Float b) { return (Float)_mm512_maskz_min_ps(kAll, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
VLMFAST_INLINE Float larger(Float a, Float b) { return (Float)_mm256_max_ps((__m256)a, (__m256)b); }
VLMFAST_INLINE Float smaller(Float a, Float b) { return (Float)_mm256_min_ps((__m256)a, (__m256)b); }
#else
VLMFAST_INLINE Float larger(Float a, Float b) { return a > b ? a : b; }
VLMFAST_INLINE Float smaller(Float a, Float b) { return a < b ? a : b; }
#endif

// Adds the lanes from first to last.
VLMFAST_INLINE float sum_of_lanes(Float value) {
  float sum = value[0];
  for (int lane = 1; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}
VLMFAST_INLINE float largest_lane(Float value) {
  float largest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

// One level of `sums_of`: adds the two halves of each run of 2 * kRun lanes, and interleaves the sums of a and of b.
template <int kRun, int... lane>
VLMFAST_INLINE Float fold(Float a, Float b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / kRun % 2 * kLanes + lane / kRun / 2 * 2 * kRun + lane % kRun)...) +
         __builtin_shufflevector(a, b, (lane / kRun % 2 * kLanes + lane / kRun / 2 * 2 * kRun + lane % kRun + kRun)...);
}

// Returns the horizontal sum of each of kLanes registers, one sum per lane. Overwrites `rows`.
template <int kRun = kLanes / 2>
VLMFAST_INLINE Float sums_of(Float (&rows)[kLanes]) {
  VLMFAST_UNROLL
  for (int i = 0; i < kRun; ++i) {
    rows[i] = fold<kRun>(rows[i], rows[i + kRun], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (kRun > 1) {
    return sums_of<kRun / 2>(rows);
  } else {
    return rows[0];
  }
}

constexpr float kLog2E = 0x1.715476p0f;
constexpr float kShift = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the sum

// 2^x for x <= 0, to 1 ulp. Results are clamped to at least 2^-125, so that none is subnormal. NaNs stay NaNs.
VLMFAST_INLINE Float exp2(Float x) {
  constexpr float kLeast = -125;
  x = larger(Float{} + kLeast, x);
  const Float shifted = x + kShift, rest = x - (shifted - kShift);
  // The degree-6 minimax polynomial in relative error on [-0.5, 0.5]: 2e-9 before its coefficients are rounded.
  Float value = multiply_add(rest, Float{} + 0x1.41d334p-13f, Float{} + 0x1.5f456ap-10f);
  value = multiply_add(rest, value, Float{} + 0x1.3b2dbcp-7f);
  value = multiply_add(rest, value, Float{} + 0x1.c6aed4p-5f);
  value = multiply_add(rest, value, Float{} + 0x1.ebfbdap-3f);
  value = multiply_add(rest, value, Float{} + 0x1.62e430p-1f);
  value = multiply_add(rest, value, Float{} + 1.0f);
  return value * (Float)(((Bits)shifted << 23) + 0x3f800000u);
}

// The squared length of a row, in double precision.
template <class T>
VLMFAST_INLINE double square_length(const T* row, int64_t size) {
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  Double squares[2] = {};
  each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block block = load(row + offset, count);
    VLMFAST_UNROLL
    for (int part = 0; part < kParts; ++part) {
      Half halves[2];
      std::memcpy(halves, &block.part[part], sizeof(halves));
      for (int i = 0; i < 2; ++i) {
        const Double values = __builtin_convertvector(halves[i], Double);
        squares[i] = multiply_add(values, values, squares[i]);
      }
    }
  });
  const Double both = squares[0] + squares[1];
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += both[lane];
  return sum;
}

// ---- matrix multiplication, in tiles of kTileRows rows by kTileVectors registers of columns ----

// Packs the rows of a matrix, times a factor, into panels of kColumns rows side by side: element (row, k) goes to
// [row / kColumns][k][row % kColumns]. The last panel is filled up with copies of the last row.
template <int kColumns, class T, class Scalar, class RowAt>
VLMFAST_INLINE void pack(int64_t rows, int64_t depth, const RowAt& row_at, float factor, Scalar* to) {
  for (int64_t first = 0; first < rows; first += kColumns, to += depth * kColumns) {
    for (int column = 0; column < kColumns; ++column) {
      const T* row = row_at(first + column < rows ? first + column : rows - 1);
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) {
        const Float elements = load_in_order(row + k) * factor;
        VLMFAST_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) to[(k + lane) * kColumns + column] = elements[lane];
      }
      T rest[kLanes] = {};
      std::memcpy(rest, row + k, (depth - k) * sizeof(T));
      const Float elements = load_in_order(rest) * factor;
      for (int lane = 0; lane < depth - k; ++lane) to[(k + lane) * kColumns + column] = elements[lane];
    }
  }
}

// The accumulators of a tile fill the register file, except for the operands of one step.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;

// Dots are accumulated in chains of kChain terms, whose sums are then added: half the error of one chain of 128 terms.
constexpr int64_t kChain = 32;

// Computes a tile of dots from packed rows [depth][kTileRows] and packed columns [depth][kTileVectors * lanes].
template <class Vector, class Scalar>
VLMFAST_INLINE void multiply(const Scalar* rows, const Scalar* columns, int64_t depth,
                             Vector (&dots)[kTileRows][kTileVectors]) {
  constexpr int kWidth = sizeof(Vector) / sizeof(Scalar);
  for (int64_t first = 0; first == 0 || first < depth; first += kChain) {
    Vector sums[kTileRows][kTileVectors] = {};
    const int64_t steps = depth - first < kChain ? depth - first : kChain;
#pragma GCC unroll 1
    for (int64_t k = 0; k < steps; ++k, rows += kTileRows, columns += kTileVectors * kWidth) {
      Vector column[kTileVectors];
      VLMFAST_UNROLL
      for (int v = 0; v < kTileVectors; ++v) column[v] = load_unaligned<Vector>(columns + v * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const Vector row =
            rows[r] - Vector{};  // a broadcast: x - 0 is x and compiles to nothing, x + 0 does not (-0 + 0 is 0)
        VLMFAST_UNROLL
        for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(row, column[v], sums[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      VLMFAST_UNROLL
      for (int v = 0; v < kTileVectors; ++v) dots[r][v] = first == 0 ? sums[r][v] : dots[r][v] + sums[r][v];
    }
  }
}

}  // namespace
}  // namespace vlmfast
