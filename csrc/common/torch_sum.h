// The sum over a row in the order of torch.sum. Only csrc/*/*_kernels.cpp may include this header.
#pragma once

#include "common/vector.h"

namespace vlmfast {
namespace {

// Returns where a stored block has the given element of the loaded row: load(const BFloat16*) separates even and odd
// ones.
template <class T>
constexpr int place(int element) {
  return element;
}
template <>
constexpr int place<BFloat16>(int element) {
  const int word = element / 2;
  return (word / kLanes * 2 + element % 2) * kLanes + word % kLanes;
}

// In a stored block, the eight lanes of each chain lie in two runs of four, which begin at `quad_place`.
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

// Adds the last `size % 32` elements of a row to its chains, and returns the sum of those that fill no vector of 8
// lanes. For a row shorter than one vector, returns the whole sum. Not inlined, because many copies of it compile
// slowly.
template <class T>
__attribute__((noinline)) float sum_rest(const float* tail, int64_t size, float* chains) {
  const int rest = static_cast<int>(size % kBlock);
  float sum = 0;
  if (size < kChainLanes) {  // torch then adds scalars, in four chains
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

// Returns the sum over a row, from the sums of its whole blocks and the incomplete last block.
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

// Computes N sums over a row, whose terms add_terms(offset, count, sums) adds block by block. The result is
// bit-identical to torch.sum of float32 on x86-64 (aten/src/ATen/native/cpu/SumKernel.cpp, which has vectors of 8 lanes
// on every machine). The order is: four chains of vectors, each accumulated in levels of 16 additions; the last
// vectors, fewer than four, go into the first chain; the elements that fill no vector are added one by one; then the
// chains, then the lanes.
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
