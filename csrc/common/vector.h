// Blocks of 32 floats, written in the vector extensions of GCC and Clang: one source for every instruction set.
//
// Only csrc/*/*_kernels.cpp may include this header. Everything is in an unnamed namespace: each name is compiled once
// per instruction set, and the linker must not merge the copies.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/types.h"

#define VLMFAST_INLINE inline __attribute__((always_inline))
#define VLMFAST_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))
// For loops over arrays of blocks: GCC keeps the array in registers only if it unrolls the loop early.
#define VLMFAST_UNROLL _Pragma("GCC unroll 8")

namespace vlmfast {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kLanes = kRegisterBytes / 4;  // floats in a register
constexpr int kParts = kBlock / kLanes;     // registers in a block

typedef float Float __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A bfloat16 whose blocks keep the elements in memory order, as blocks of float32 do: for kernels that combine the two,
// or that tell the elements of a last block from its padding.
struct OrderedBFloat16 : BFloat16 {};
template <class T>
using Ordered = std::conditional_t<std::is_same_v<T, BFloat16>, OrderedBFloat16, T>;

template <class V, class T>
VLMFAST_INLINE V load_unaligned(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// A non-temporal store, to an address that is a multiple of kRegisterBytes. Other threads see it after
// finish_streams().
VLMFAST_INLINE void stream(void* to, Bits value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
#else
  std::memcpy(to, &value, sizeof(value));
#endif
}
VLMFAST_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- blocks ----

// kBlock adjacent elements of a row, in the order that is cheapest to load: see `place` in torch_sum.h.
struct Block {
  Float part[kParts];
};

template <class F>
VLMFAST_INLINE Block each_part(const F& function) {
  Block result;
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) result.part[i] = function(i);
  return result;
}

VLMFAST_INLINE Block operator+(const Block& a, const Block& b) {
  return each_part([&](int i) { return a.part[i] + b.part[i]; });
}
VLMFAST_INLINE Block operator-(const Block& a, const Block& b) {
  return each_part([&](int i) { return a.part[i] - b.part[i]; });
}
VLMFAST_INLINE Block operator*(const Block& a, const Block& b) {
  return each_part([&](int i) { return a.part[i] * b.part[i]; });
}
VLMFAST_INLINE Block operator*(const Block& a, float b) {
  return each_part([&](int i) { return a.part[i] * b; });
}
VLMFAST_INLINE Block operator+(float a, const Block& b) {
  return each_part([&](int i) { return a + b.part[i]; });
}

// a * b + c, rounded once.
template <class V>
VLMFAST_INLINE V fused(V a, V b, V c) {
  [[maybe_unused]] constexpr bool kSingle = std::is_same_v<std::decay_t<decltype(a[0])>, float>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && kSingle) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(V) == 64 && !kSingle) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
#if defined(__FMA__)
  if constexpr (sizeof(V) == 32 && kSingle) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(V) == 32 && !kSingle) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
  V result;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) {
    result[lane] = kSingle ? __builtin_fmaf(a[lane], b[lane], c[lane]) : __builtin_fma(a[lane], b[lane], c[lane]);
  }
  return result;
}
VLMFAST_INLINE Block fused(const Block& a, const Block& b, const Block& c) {
  return each_part([&](int i) { return fused(a.part[i], b.part[i], c.part[i]); });
}

// ---- float32 ----

VLMFAST_INLINE Block load(const float* from) {
  return each_part([&](int i) { return load_unaligned<Float>(from + i * kLanes); });
}
VLMFAST_INLINE void store(float* to, const Block& block) { std::memcpy(to, &block, sizeof(block)); }

// ---- bfloat16: two elements to a 32-bit word, the even ones in one register and the odd ones in the next ----

// Rounds to nearest even. The result is in the upper 16 bits; the lower 16 are garbage. NaNs stay NaNs: those that come
// from bfloat16 or from arithmetic have zeros in the lower bits, so the addition cannot carry.
VLMFAST_INLINE Bits bfloat16_bits(Float value) {
  const Bits bits = (Bits)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

VLMFAST_INLINE void widen(Bits words, Float* parts) {
  parts[0] = (Float)(words << 16);
  parts[1] = (Float)(words & 0xffff0000u);
}
VLMFAST_INLINE Block load(const BFloat16* from) {
  Block block;
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i += 2) widen(load_unaligned<Bits>(from + i * kLanes), &block.part[i]);
  return block;
}
VLMFAST_INLINE void store(BFloat16* to, const Block& block) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; i += 2) {
    const Bits words = (bfloat16_bits(block.part[i]) >> 16) | (bfloat16_bits(block.part[i + 1]) & 0xffff0000u);
    std::memcpy(to + i * kLanes, &words, sizeof(words));
  }
}
VLMFAST_INLINE Float round_to_bfloat16(Float value) { return (Float)(bfloat16_bits(value) & 0xffff0000u); }

// ---- float16 ----

#define VLMFAST_HALF_INLINE VLMFAST_INLINE
#if defined(__AVX512F__)
constexpr bool kHalfInstructions = true;
typedef __m256i Halves;
constexpr __mmask16 kAll = 0xffff;  // the masked intrinsics: GCC warns inside its unmasked ones
VLMFAST_INLINE Float from_halves(Halves halves) { return (Float)_mm512_maskz_cvtph_ps(kAll, halves); }
VLMFAST_INLINE Halves to_halves(Float value) {
  return _mm512_maskz_cvtps_ph(kAll, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
constexpr bool kHalfInstructions = true;
typedef __m128i Halves;
VLMFAST_INLINE Float from_halves(Halves halves) { return (Float)_mm256_cvtph_ps(halves); }
VLMFAST_INLINE Halves to_halves(Float value) { return _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
constexpr bool kHalfInstructions = false;
#undef VLMFAST_HALF_INLINE  // with a copy of these conversions at each use, kernels take minutes to compile
#define VLMFAST_HALF_INLINE inline __attribute__((noinline))
typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes / 2)));

VLMFAST_INLINE Float from_halves(Halves halves) {
  const Bits bits = __builtin_convertvector(halves, Bits), magnitude = bits & 0x7fffu;
  // A subnormal float16 is a multiple of 2^-24, which is the unit in the last place of a float in [0.5, 1).
  const Float denormal = (Float)(magnitude + 0x3f000000u) - 0.5f;
  const Bits rebased = (magnitude << 13) + ((127u - 15u) << 23);
  const Bits special = (magnitude << 13) | 0x7f800000u;  // infinities and NaNs
  const Bits wide = magnitude < 0x0400u ? (Bits)denormal : magnitude < 0x7c00u ? rebased : special;
  return (Float)(wide | ((bits & 0x8000u) << 16));
}
VLMFAST_INLINE Halves to_halves(Float value) {
  const Bits bits = (Bits)value, magnitude = bits & 0x7fffffffu;
  const Bits denormal = (Bits)((Float)magnitude + 0.5f) - 0x3f000000u;
  const Bits rounded = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits finite = magnitude < 0x38800000u ? denormal : rounded;              // below 2^-14
  const Bits bounded = magnitude < 0x477ff000u ? finite : finite * 0 + 0x7c00u;  // from 65520 on
  const Bits result = magnitude > 0x7f800000u ? finite * 0 + 0x7e00u : bounded;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), Halves);
}
#endif

VLMFAST_HALF_INLINE Block load(const Float16* from) {
  return each_part([&](int i) { return from_halves(load_unaligned<Halves>(from + i * kLanes)); });
}
VLMFAST_HALF_INLINE void store(Float16* to, const Block& block) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) {
    const Halves halves = to_halves(block.part[i]);
    std::memcpy(to + i * kLanes, &halves, sizeof(halves));
  }
}
VLMFAST_HALF_INLINE Block round_to_float16(const Block& block) {
  return each_part([&](int i) { return from_halves(to_halves(block.part[i])); });
}

// ---- any element type ----

typedef uint16_t HalfWords __attribute__((vector_size(kRegisterBytes / 2)));

// Loads one register of adjacent elements in memory order.
VLMFAST_INLINE Float load_in_order(const float* from) { return load_unaligned<Float>(from); }
VLMFAST_INLINE Float load_in_order(const Float16* from) { return from_halves(load_unaligned<Halves>(from)); }
VLMFAST_INLINE Float load_in_order(const BFloat16* from) {
  return (Float)(__builtin_convertvector(load_unaligned<HalfWords>(from), Bits) << 16);
}

VLMFAST_INLINE Block load(const OrderedBFloat16* from) {
  return each_part([&](int i) { return load_in_order(from + i * kLanes); });
}
VLMFAST_INLINE void store(OrderedBFloat16* to, const Block& block) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) {
    const HalfWords words = __builtin_convertvector(bfloat16_bits(block.part[i]) >> 16, HalfWords);
    std::memcpy(to + i * kLanes, &words, sizeof(words));
  }
}

// Rounds a block to T and widens it again.
template <class T>
VLMFAST_INLINE Block round_to(const Block& block) {
  if constexpr (std::is_base_of_v<BFloat16, T>) {
    return each_part([&](int i) { return round_to_bfloat16(block.part[i]); });
  } else if constexpr (std::is_same_v<T, Float16>) {
    return round_to_float16(block);
  } else {
    return block;
  }
}
template <class T>
VLMFAST_INLINE Block round_if(bool rounded, const Block& block) {
  return rounded ? round_to<T>(block) : block;
}

// ---- rows: whole blocks, then the first `count` elements of the last one ----

struct Whole {};

template <class T>
VLMFAST_INLINE Block load(const T* from, Whole) {
  return load(from);
}
template <class T>
VLMFAST_INLINE Block load(const T* from, int count) {
  T padded[kBlock] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}
template <class T>
VLMFAST_INLINE void store(T* to, const Block& block, Whole) {
  store(to, block);
}
template <class T>
VLMFAST_INLINE void store(T* to, const Block& block, int count) {
  T padded[kBlock];
  store(padded, block);
  std::memcpy(to, padded, count * sizeof(T));
}

// Calls function(offset, count) on each block of a row: `count` is Whole{}, and an int for the last, incomplete block.
template <class F>
VLMFAST_INLINE void each_block(int64_t size, const F& function) {
  int64_t offset = 0;
  for (; offset + kBlock <= size; offset += kBlock) function(offset, Whole{});
  if (offset < size) function(offset, static_cast<int>(size - offset));
}

// Splits the rows from `begin` to `end` into groups that a kernel processes together, and calls function(begin, end,
// rows, size) on ranges of whole groups of `rows` rows. Rows of 64 or 128 elements form groups of four, and their
// number and size are compile-time constants: for so short a row the latency of its sum is as long as the rest of the
// work. Longer rows form groups of kWide. Rows that fill no group, and all rows if kWide is 1, are processed singly.
template <int kWide, class F>
VLMFAST_INLINE void in_groups(int64_t begin, int64_t end, int64_t size, const F& function) {
  constexpr std::integral_constant<int, 4> kNarrow;
  constexpr std::integral_constant<int, 1> kSingle;
  const auto groups = VLMFAST_LAMBDA(auto rows, auto row_size) {
    const int64_t stop = end - (end - begin) % rows;
    if (begin < stop) function(begin, stop, rows, row_size);
    begin = stop;
  };
  if (size == 0) return;
  if constexpr (kWide > 1) {
    if (size == 128) {
      groups(kNarrow, 128);
    } else if (size == 64) {
      groups(kNarrow, 64);
    } else {
      groups(std::integral_constant<int, kWide>{}, size);
    }
  }
  groups(kSingle, size);
}

}  // namespace
}  // namespace vlmfast
