// The arithmetic of the greedy choices on the CPU, compiled once per instruction set (see types.h).
#include "greedy_selection/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

constexpr int kPanel = kTileVectors * kLanes;
constexpr int kTogether = 24;    // rows that are multiplied with a part of a panel
constexpr int64_t kDepth = 512;  // elements of a part: a multiple of kChain
static_assert(kTogether % kTileRows == 0);

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
  return {kPanel,  kTogether, VLMFAST_BY_DTYPE(widen), VLMFAST_BY_DTYPE(pack_panels), VLMFAST_BY_DTYPE(pack_tile),
          cosines, take_off,  VLMFAST_BY_DTYPE(gain),  VLMFAST_BY_DTYPE(cover)};
}

}  // namespace vlmfast
