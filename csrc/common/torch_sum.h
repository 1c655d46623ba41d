// The sum over a row in the order that torch takes it in: for csrc/*_kernels.cpp alone, as vector.h.
#pragma once

#include "common/vector.h"

namespace vlmfast {
namespace {

// The place in a stored block of the element that was loaded as the given one.
template <class T>
constexpr int place(int element) {
  return element;
}
template <>
constexpr int place<BFloat16>(int element) {
  const int word = element / 2;
  return (word / kLanes * 2 + element % 2) * kLanes + word % kLanes;
}

// The eight lanes of a chain of a stored block are two runs of four, which begin at `quad_place`.
typedef float Quad __attribute__((vector_size(16)));
template <class T>
constexpr int quad_place(int chain, int quad) {
  return place<T>(8 * chain + quad * (std::is_same_v<T, BFloat16> ? 1 : 4));
}
template <class T>
VLMFAST_INLINE float lane_of(const Quad (&quads)[2], int lane) {
  return std::is_same_v<T, BFloat16> ? quads[lane % 2][lane / 2] : quads[lane / 4][lane % 4];
}
constexpr int kChains = 4, kChainLanes = kBlock / kChains;

// Adds the last `size % 32` elements of a row to its chains, and returns the sum of those that fill no vector. Not inline,
// because compilers take long over so many copies of it.
template <class T>
__attribute__((noinline)) float sum_rest(const float* tail, int64_t size, float* chains) {
  const int rest = static_cast<int>(size % kBlock);
  float sum = 0;
  if (size < kChainLanes) {  // four chains of one lane
    const int chained = size < kChains ? 1 : kChains;
    sum = tail[place<T>(0)];
    for (int e = chained; e < rest; ++e) sum += tail[place<T>(e)];
    for (int e = 1; e < chained; ++e) sum += tail[place<T>(e)];
    return sum;
  }
  const int vectors = rest / kChainLanes * kChainLanes;
  for (int e = 0; e < vectors; ++e) chains[place<T>(e % kChainLanes)] += tail[place<T>(e)];
  for (int e = vectors; e < rest; ++e) sum += tail[place<T>(e)];
  return sum;
}

// The sum over a row, from the sum of its whole blocks and the block of its last elements.
template <class T>
VLMFAST_INLINE float torch_sum_of_lanes(const Block& blocks, const Block& last, int64_t size) {
  float chains[kBlock], tail[kBlock];
  store(chains, blocks);
  float sum = 0;
  if (size % kBlock > 0) {
    store(tail, last);
    sum = sum_rest<T>(tail, size, chains);
    if (size < kChainLanes) return sum;
  }
  Quad quads[2];
  for (int quad = 0; quad < 2; ++quad) {
    quads[quad] = load_unaligned<Quad>(chains + quad_place<T>(0, quad));
    for (int chain = 1; chain < kChains; ++chain) {
      quads[quad] = quads[quad] + load_unaligned<Quad>(chains + quad_place<T>(chain, quad));
    }
  }
#pragma GCC unroll 8
  for (int lane = 0; lane < kChainLanes; ++lane) sum += lane_of<T>(quads, lane);
  return sum;
}

// Takes N sums over a row, of blocks that add_terms(offset, count, sums) adds, to the bit as torch.sum of float32 does on
// x86-64 (aten/src/ATen/native/cpu/SumKernel.cpp, with vectors of 8 lanes on every machine): four chains of vectors;
// each chain 16 additions at a time, 16 of such sums at a time, and so on; the rest of fewer than four vectors into the
// first chain; the elements that fill no vector one after the other; then the chains, then the lanes.
template <class T, int N, class AddTerms>
VLMFAST_INLINE void torch_sum(int64_t size, float (&sums)[N], const AddTerms& add_terms) {
  const int64_t blocks = size / kBlock;
  int64_t block = 0;
  Block running[N] = {}, level[kSumLevels][N] = {}, last[N] = {};
  const auto add_until = VLMFAST_LAMBDA(int64_t end) {
#pragma GCC unroll 2
    for (; block < end; ++block) add_terms(block * kBlock, Whole{}, running);
  };
  while (block + kSumStep <= blocks) {
    add_until(block + kSumStep);
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      level[0][n] = level[0][n] + running[n];
      running[n] = {};
    }
    for (int64_t above = 1, full = kSumStep; above < kSumLevels && block / full % kSumStep == 0;
         ++above, full *= kSumStep) {
      VLMFAST_UNROLL
      for (int n = 0; n < N; ++n) {
        level[above][n] = level[above][n] + level[above - 1][n];
        level[above - 1][n] = {};
      }
    }
  }
  add_until(blocks);
  if (blocks >= kSumStep) {
    for (int above = 0; above < kSumLevels; ++above) {
      VLMFAST_UNROLL
      for (int n = 0; n < N; ++n) running[n] = running[n] + level[above][n];
    }
  }
  if (size % kBlock > 0) add_terms(blocks * kBlock, static_cast<int>(size % kBlock), last);
  VLMFAST_UNROLL
  for (int n = 0; n < N; ++n) sums[n] = torch_sum_of_lanes<T>(running[n], last[n], size);
}

}  // namespace
}  // namespace vlmfast
