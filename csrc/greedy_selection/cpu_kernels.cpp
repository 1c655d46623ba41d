// The arithmetic of the greedy choices on the CPU, compiled once per instruction set (see types.h).
#include "greedy_selection/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

constexpr int kPanel = kTileVectors * kLanes;
constexpr int kTogether = 24;    // rows that are multiplied with a part of a panel
constexpr int64_t kDepth = 512;  // elements of a part: a multiple of kChain
static_assert(kTogether % kTileRows == 0);

// Of sketches: an element is at most kMost, and the square of a token is that of kTypical for each of its elements. A
// few elements may be much larger than all others: scaled by the largest, these others would be 0.
constexpr int kMost = 15, kOffset = kMost + 1;
constexpr float kTypical = 5;
constexpr int64_t kSketchChain = 32;  // words whose sums fit into 16 bits
static_assert(kSketchChain * 2 * (kMost + kOffset) * kMost < 1 << 15);
constexpr int kSketchTokens = 3 * kPanel, kSketchElements = 4 * kLanes;
static_assert(kSketchTokens % kTileRows == 0);

typedef int8_t Bytes __attribute__((vector_size(kRegisterBytes)));
typedef int16_t Shorts __attribute__((vector_size(kRegisterBytes)));
typedef int32_t Ints __attribute__((vector_size(kRegisterBytes)));

// Reads rows of weights.
template <class T>
bool widen(const void* weights, int64_t count, float* to) {
  const T* const from = static_cast<const T*>(weights);
  Bits bad = {};
  const auto step = VLMFAST_LAMBDA(const T* at) {
    const Float values = load_in_order(at);
    bad |= ~(Bits)(values >= 0.0f) | ~(Bits)(values <= __FLT_MAX__);
    return values;
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Float values = step(from + at);
    std::memcpy(to + at, &values, sizeof(values));
  }
  T rest[kLanes] = {};
  std::memcpy(rest, from + at, (count - at) * sizeof(T));
  const Float values = step(rest);
  std::memcpy(to + at, &values, (count - at) * sizeof(float));
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  return any == 0;
}

// Returns 1 / |row|, or 0 if the square of |row| is 0 or not finite in float32.
template <class T>
VLMFAST_INLINE float inverse_length(const T* row, int64_t size) {
  const float square = static_cast<float>(square_length(row, size));
  return square > 0 && square <= __FLT_MAX__ ? 1 / __builtin_sqrtf(square) : 0.0f;
}

template <class T>
void pack_panels(const TokenRows& rows, const TokenPanels& panels, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel, left = rows.tokens - first, present = left < kPanel ? left : kPanel;
    const auto row_at = [&](int64_t row) { return reinterpret_cast<const T*>(rows.at(first + row)); };
    pack<kPanel, T>(present, rows.size, row_at, 1.0f, panels.elements + first * rows.size);
    for (int64_t row = 0; row < kPanel; ++row) {
      panels.inverse[first + row] = row < present ? inverse_length(row_at(row), rows.size) : 0.0f;
    }
  }
}

template <class T>
void pack_tile(const TokenRows& rows, const int32_t* tokens, int64_t count, float* to) {
  pack<kTileRows, T>(count, rows.size, [&](int64_t row) { return reinterpret_cast<const T*>(rows.at(tokens[row])); },
                     1.0f, to);
}

// Multiplies part by part: a part of a panel stays in the L1 cache while all rows are multiplied with it. The inverse
// lengths are multiplied first, so that the cosine of i and j has the same bits as that of j and i.
void cosines(const TokenPanels& panels, int64_t size, const float* tile, const int32_t* tokens, int64_t count,
             int64_t begin, int64_t end, float* const* to) {
  for (int64_t depth = 0; depth == 0 || depth < size; depth += kDepth) {
    const bool is_first = depth == 0, is_last = depth + kDepth >= size;
    const int64_t steps = is_last ? size - depth : kDepth;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel;
      const float* const columns = panels.elements + first * size + depth * kPanel;
      for (int64_t group = 0; group < count; group += kTileRows) {
        Float dots[kTileRows][kTileVectors];
        multiply(tile + group * size + depth * kTileRows, columns, steps, dots);
        const int64_t left = count - group, present = left < kTileRows ? left : kTileRows;
        for (int64_t row = 0; row < present; ++row) {
          const float own = panels.inverse[tokens[group + row]];
          for (int v = 0; v < kTileVectors; ++v) {
            float* const at = to[group + row] + first + v * kLanes;
            Float dot = dots[row][v];
            if (!is_first) dot += load_unaligned<Float>(at);
            if (is_last) {
              const Float both = load_unaligned<Float>(panels.inverse + first + v * kLanes) * own;
              dot = both != 0.0f ? dot * both : Float{};
            }
            std::memcpy(at, &dot, sizeof(dot));
          }
        }
      }
    }
  }
}

// Adds to each sum two products of elements, the first without a sign.
VLMFAST_INLINE Shorts add_pairs(Bytes plain, Bytes with_sign, Shorts sums) {
#if defined(__AVX512BW__)
  return sums + (Shorts)_mm512_maddubs_epi16((__m512i)plain, (__m512i)with_sign);
#elif defined(__AVX2__)
  return sums + (Shorts)_mm256_maddubs_epi16((__m256i)plain, (__m256i)with_sign);
#else
  const Shorts a = (Shorts)plain, b = (Shorts)with_sign;
  return sums + (a & 0xff) * ((b << 8) >> 8) + (a >> 8) * (b >> 8);
#endif
}

// Sketches four registers of elements, one byte of each word from each of them: every token has the same order.
template <class T>
VLMFAST_INLINE Ints sketch_elements(const T* from, float factor, Ints& sums) {
  Ints words = {};
  VLMFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Float scaled = load_in_order(from + i * kLanes) * factor;
    const Float within = larger(smaller(scaled, Float{} + kMost), Float{} - kMost);
    const Ints nearest = (Ints)(within + kShift) - (Ints)(Float{} + kShift);
    sums += nearest;
    words |= (nearest & 0xff) << (8 * i);
  }
  return words;
}

template <class T>
void sketch_row(const T* row, int64_t size, const TokenSketches& sketches, int64_t token) {
  int32_t* to = sketches.rows + token * sketches.words;
  const float inverse = row == nullptr ? 0.0f : inverse_length(row, size);
  sketches.inverse[token] = inverse;
  sketches.sums[token] = 0;
  if (inverse == 0) {
    std::memset(to, 0, sketches.words * sizeof(int32_t));
    return;
  }
  const float factor = inverse * kTypical * __builtin_sqrtf(static_cast<float>(size));
  Ints sums = {};
  for (int64_t at = 0; at < size; at += kSketchElements, to += kLanes) {
    T rest[kSketchElements] = {};
    const bool is_whole = at + kSketchElements <= size;
    if (!is_whole) std::memcpy(rest, row + at, (size - at) * sizeof(T));
    const Ints words = sketch_elements(is_whole ? row + at : rest, factor, sums);
    std::memcpy(to, &words, sizeof(words));
  }
  for (int lane = 0; lane < kLanes; ++lane) sketches.sums[token] += sums[lane];
}

template <class T>
void sketch(const TokenRows& rows, const TokenSketches& sketches, int64_t begin, int64_t end) {
  for (int64_t token = begin * kPanel; token < end * kPanel; ++token) {
    const T* const row = token < rows.tokens ? reinterpret_cast<const T*>(rows.at(token)) : nullptr;
    sketch_row(row, rows.size, sketches, token);
    const int32_t* const from = sketches.rows + token * sketches.words;
    int32_t* const to = sketches.panels + token / kPanel * kPanel * sketches.words + token % kPanel;
    for (int64_t word = 0; word < sketches.words; ++word) to[word * kPanel] = from[word] + kOffset * 0x01010101;
  }
}

VLMFAST_INLINE Ints sums_of_pairs(Shorts pairs) { return ((Ints)pairs >> 16) + (((Ints)pairs << 16) >> 16); }

void guess(const TokenSketches& sketches, int64_t panel, int32_t* guesses) {
  const int64_t words = sketches.words, first = panel * kPanel;
  for (int64_t row = 0; row < first + kPanel; row += kTileRows) {
    const int32_t *rows = sketches.rows + row * words, *columns = sketches.panels + first * words;
    Ints dots[kTileRows][kTileVectors] = {};
    for (int64_t word = 0; word < words;) {
      const int64_t stop = words - word < kSketchChain ? words : word + kSketchChain;
      Shorts sums[kTileRows][kTileVectors] = {};
#pragma GCC unroll 1
      for (; word < stop; ++word, columns += kPanel) {
        Bytes column[kTileVectors];
        VLMFAST_UNROLL
        for (int v = 0; v < kTileVectors; ++v) column[v] = load_unaligned<Bytes>(columns + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const Bytes own = (Bytes)(rows[r * words + word] - Ints{});
          VLMFAST_UNROLL
          for (int v = 0; v < kTileVectors; ++v) sums[r][v] = add_pairs(column[v], own, sums[r][v]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        VLMFAST_UNROLL
        for (int v = 0; v < kTileVectors; ++v) dots[r][v] += sums_of_pairs(sums[r][v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) dots[r][v] -= kOffset * sketches.sums[row + r];
      std::memcpy(guesses + (row + r) * sketches.padded + first, dots[r], sizeof(dots[r]));
    }
  }
}

void likeliest(const TokenSketches& sketches, int32_t* guesses, int32_t* likeliest) {
  constexpr int32_t kLeast = -__INT32_MAX__ - 1;
  const int64_t tokens = sketches.tokens, padded = sketches.padded;
  int32_t* const most = sketches.sums;  // which are not needed any more
  for (int64_t token = 0; token < padded; ++token) most[token] = kLeast, likeliest[token] = -1;
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  for (int32_t token = 0; token < tokens; ++token) {
    int32_t* const row = guesses + token * padded;
    for (int64_t other = tokens; other < padded; ++other) row[other] = kLeast;
    row[token] = kLeast;
    Ints own = Ints{} + kLeast, which = Ints{} - 1;
    for (int32_t other = token / kLanes * kLanes; other < padded; other += kLanes) {
      const Ints now = load_unaligned<Ints>(row + other);
      which = now > own ? lanes + other : which;
      own = now > own ? now : own;
      const Ints theirs = load_unaligned<Ints>(most + other), before = load_unaligned<Ints>(likeliest + other);
      const Ints more = now > theirs ? now : theirs, best = now > theirs ? Ints{} + token : before;
      std::memcpy(most + other, &more, sizeof(more));
      std::memcpy(likeliest + other, &best, sizeof(best));
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (own[lane] <= most[token]) continue;
      most[token] = own[lane];
      likeliest[token] = which[lane];
    }
  }
}

template <class T>
float dot(const char* row, const char* other, int64_t size) {
  const T *const a = reinterpret_cast<const T*>(row), *const b = reinterpret_cast<const T*>(other);
  const auto add = VLMFAST_LAMBDA(Block & sum, int64_t offset, auto count) {
    const Block x = load(a + offset, count), y = load(b + offset, count);
    sum = each_part([&](int i) { return multiply_add(x.part[i], y.part[i], sum.part[i]); });
  };
  // Longer chains would round equal terms alike, and tell doubles apart by more than kSame.
  constexpr int64_t kStep = 2 * kBlock, kLongest = 16 * kStep;
  Block total = {};
  int64_t at = 0;
  while (at + kStep <= size) {
    const int64_t stop = at + (size - at < kLongest ? size - at : kLongest);
    Block sums[2] = {};
    for (; at + kStep <= stop; at += kStep) {
      add(sums[0], at, Whole{});
      add(sums[1], at + kBlock, Whole{});
    }
    total = total + (sums[0] + sums[1]);
  }
  each_block(size - at, VLMFAST_LAMBDA(int64_t offset, auto count) { add(total, at + offset, count); });
  Float sum = total.part[0];
  for (int i = 1; i < kParts; ++i) sum += total.part[i];
  return sum_of_lanes(sum);
}

void take_off(const float* cosines, int64_t best, int64_t step, int64_t tokens, float least, float* shares,
              float* left) {
  const float inverse = 1 / __builtin_sqrtf(left[best]);
  each_block(tokens, VLMFAST_LAMBDA(int64_t offset, auto count) {
    Block rest = load(cosines + offset, count);
    for (const float* earlier = shares; earlier != shares + step * tokens; earlier += tokens) {
      rest = rest - load(earlier + offset, count) * earlier[best];
    }
    const Block share = rest * inverse, now = load(left + offset, count) - share * share;
    store(shares + step * tokens + offset, share, count);
    store(left + offset, each_part([&](int i) { return now.part[i] >= least ? now.part[i] : Float{}; }), count);
  });
}

// Returns the similarity, or 0 if it is not finite: then it covers nothing.
VLMFAST_INLINE Float sound(Float similarity) {
  return similarity <= __FLT_MAX__ && similarity >= -__FLT_MAX__ ? similarity : Float{};
}
VLMFAST_INLINE Block sound(const Block& similarity) {
  return each_part([&](int i) { return sound(similarity.part[i]); });
}

template <class T>
float gain(const void* similarity, int64_t rows, const float* covered, const float* weights) {
  const auto* const from = static_cast<const Ordered<T>*>(similarity);
  Block sums = {};
  each_block(rows, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block better = sound(load(from + offset, count)) - load(covered + offset, count);
    const Block weight = load(weights + offset, count);
    sums = each_part(
        [&](int i) { return sums.part[i] + (better.part[i] > 0.0f ? better.part[i] : Float{}) * weight.part[i]; });
  });
  Float sum = sums.part[0];
  for (int i = 1; i < kParts; ++i) sum += sums.part[i];
  return sum_of_lanes(sum);
}

template <class T>
void cover(const void* similarity, int64_t rows, float* covered) {
  const auto* const from = static_cast<const Ordered<T>*>(similarity);
  each_block(rows, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block now = load(covered + offset, count), new_ones = sound(load(from + offset, count));
    store(covered + offset, each_part([&](int i) { return larger(new_ones.part[i], now.part[i]); }), count);
  });
}

}  // namespace

template <>
GreedySelectionKernels kernels_at<GreedySelectionKernels, CpuLevel::VLMFAST_ISA>() {
  return {kPanel,
          kTogether,
          VLMFAST_BY_DTYPE(widen),
          VLMFAST_BY_DTYPE(pack_panels),
          VLMFAST_BY_DTYPE(pack_tile),
          cosines,
          kSketchTokens,
          kSketchElements,
          VLMFAST_BY_DTYPE(sketch),
          guess,
          likeliest,
          VLMFAST_BY_DTYPE(dot),
          take_off,
          VLMFAST_BY_DTYPE(gain),
          VLMFAST_BY_DTYPE(cover)};
}

}  // namespace vlmfast
