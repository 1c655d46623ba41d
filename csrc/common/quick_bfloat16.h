// Rounding of blocks to bfloat16 by AVX512-BF16. Only csrc/*/*_kernels.cpp may include this header.
//
// One instruction rounds a block; store() of vector.h takes many. The instruction treats subnormal inputs as zero and
// flushes subnormal results, so it may only round rows that have neither, which `Least` tells. It also packs one
// register after the other, whereas load() puts the even elements into one register and the odd ones into the other, so
// packed elements must be permuted back.
#pragma once

#include "common/torch_sum.h"

namespace vlmfast {
namespace {

template <class T>
struct Quick {
  static constexpr bool kExists = false;
  struct Least {};
};

#if defined(__AVX512BF16__)
// A permutation: the index of the source word for each 16-bit word of a register.
struct Order {
  uint16_t from[kBlock];
};
template <class F>
constexpr Order order(const F& from) {
  Order result{};
  for (int i = 0; i < kBlock; ++i) result.from[i] = static_cast<uint16_t>(from(i));
  return result;
}

template <>
struct Quick<BFloat16> {
  static constexpr bool kExists = true;
  static constexpr float kExactSquare = 0x1p-67f;  // the square of a bfloat16 is exact from here on

  // Both return the elements in memory order; `round` takes them in the order of load().
  static VLMFAST_INLINE Block round(const Block& block) { return widen<true>(pack(block)); }
  template <class Count>
  static VLMFAST_INLINE Block load_in_order(const BFloat16* from, Count count) {
    return widen<false>(load_words(from, count));
  }

  template <bool in_order>
  static VLMFAST_INLINE void store(BFloat16* to, const Block& block, Whole) {
    const Bits words = in_order ? pack(block) : unpacked(pack(block));
    std::memcpy(to, &words, sizeof(words));
  }
  template <bool in_order>
  static VLMFAST_INLINE void store(BFloat16* to, const Block& block, int count) {
    BFloat16 padded[kBlock];
    store<in_order>(padded, block, Whole{});
    std::memcpy(to, padded, count * sizeof(BFloat16));
  }

  // Tracks the least magnitude among the nonzero elements that it has seen.
  class Least {
   public:
    template <class Count>
    VLMFAST_INLINE void see(const BFloat16* from, Count count) {
      // An intrinsic, because compilers turn the multiplication into a shift and a subtraction, which is 3 % slower.
      const __m512i words = (__m512i)load_words(from, count), minus_two = (__m512i)(Words{} - 2);
      turned_ = _mm512_max_epu16(turned_, _mm512_maskz_mullo_epi16(kEach, words, minus_two));
    }
    VLMFAST_INLINE bool is_below(float bound) const {
      uint32_t bits;
      std::memcpy(&bits, &bound, sizeof(bits));
      if (bits >= 0x7f800000u) return true;  // infinite, or not a number
      const uint16_t limit = static_cast<uint16_t>(-2 * ((bits >> 16) + 1));
      return _mm512_cmpgt_epu16_mask(turned_, (__m512i)(Words{} + limit)) != 0;
    }
    VLMFAST_INLINE float value() const {  // infinity if all elements were zero
      const Words turned = (Words)turned_;
      uint16_t most = 0;
      for (int i = 0; i < kBlock; ++i) most = turned[i] > most ? turned[i] : most;
      const uint32_t bits = most == 0 ? 0x7f800000u : (0x10000u - most) << 15;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }

   private:
    // The largest -2 |x| modulo 2^16 over the bits of each x. It grows as |x| gets smaller, and is 0 for zeros.
    __m512i turned_ = {};
  };

 private:
  typedef uint16_t Words __attribute__((vector_size(kRegisterBytes)));
  static constexpr __mmask32 kEach = ~__mmask32{};  // see kAll in vector.h

  static VLMFAST_INLINE Bits pack(const Block& block) {
    return (Bits)_mm512_cvtne2ps_pbh((__m512)block.part[1], (__m512)block.part[0]);
  }
  // Restores memory order after a block from load() was packed.
  static VLMFAST_INLINE Bits unpacked(Bits words) {
    static constexpr Order kOrder = order(place<BFloat16>);
    return (Bits)_mm512_maskz_permutexvar_epi16(kEach, load_unaligned<__m512i>(kOrder.from), (__m512i)words);
  }
  // Widens the first half of the elements into one register and the second half into the next, in memory order. Each
  // 16-bit word goes to the upper half of a 32-bit lane.
  template <bool packed>
  static VLMFAST_INLINE Block widen(Bits words) {
    static constexpr Order kOrder[kParts] = {order(word_for<packed, 0>), order(word_for<packed, 1>)};
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    return each_part([&](int i) {
      return (Float)_mm512_maskz_permutexvar_epi16(kUpper, load_unaligned<__m512i>(kOrder[i].from), (__m512i)words);
    });
  }
  template <bool packed, int part>
  static constexpr int word_for(int i) {
    const int element = part * kLanes + i / 2;
    return packed ? place<BFloat16>(element) : element;
  }
  static VLMFAST_INLINE Bits load_words(const BFloat16* from, Whole) { return load_unaligned<Bits>(from); }
  static VLMFAST_INLINE Bits load_words(const BFloat16* from, int count) {
    BFloat16 padded[kBlock] = {};
    std::memcpy(padded, from, count * sizeof(BFloat16));
    return load_words(padded, Whole{});
  }
};
#endif

}  // namespace
}  // namespace vlmfast
