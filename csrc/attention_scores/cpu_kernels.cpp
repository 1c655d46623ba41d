// The attention scores on the CPU, compiled once per instruction set (see types.h).
#include "attention_scores/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

template <class T>
VLMFAST_INLINE const T* row_of(const HeadRows& rows, int64_t head, int64_t token) {
  return static_cast<const T*>(rows.data) + head * rows.head_stride + token * rows.token_stride;
}

// Returns the sign of the scale. Queries are multiplied by it, so that the largest dot gives the largest logit.
VLMFAST_INLINE float sign_of(float scale) { return scale < 0 ? -1.0f : 1.0f; }

// Returns the factor from dots to exponents of 2. It is at least 2^-126, because 0 times the -infinity of a masked
// column would be NaN.
VLMFAST_INLINE float exponent_scale(float scale) {
  constexpr float kLeast = 0x1p-126f;
  const float exponent = scale * sign_of(scale) * kLog2E;
  return exponent > kLeast ? exponent : kLeast;
}

// Returns a softmax weight before the division by their sum. Subtracting before scaling is more accurate for large
// logits.
VLMFAST_INLINE Float weight_of(Float dot, Float largest, float exponent_scale) {
  return exp2((dot - largest) * exponent_scale);
}

// ---- the row of one token ----

// How many products are added one after another: with registers of four floats, a chain of eight rounds too often.
constexpr int kPartsInChain = kParts < 4 ? kParts : 4;

// Computes the dots of queries and keys for the heads from `begin` to `end`, in tiles of kLanes tokens: all heads of a
// tile come before the next tile.
template <class T>
VLMFAST_INLINE void row_dots(const RowAttention& args, int64_t begin, int64_t end, const float* query) {
  const int64_t tokens = args.tokens, size = args.head_dim, row_size = padded(tokens);
  const int64_t query_size = padded(size);
  for (int64_t first = 0; first < tokens; first += kLanes) {
    for (int64_t head = begin; head < end; ++head) {
      const T* keys[kLanes];
      Float sums[kLanes];
      VLMFAST_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        keys[i] = row_of<T>(args.key, head / args.group, first + i < tokens ? first + i : tokens - 1);
        sums[i] = Float{};
      }
      const float* q = query + (head - begin) * query_size;
      each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
        const Block q_block = load(q + offset);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const Block k_block = load(keys[i] + offset, count);
          VLMFAST_UNROLL
          for (int first_part = 0; first_part < kParts; first_part += kPartsInChain) {
            Float chain = q_block.part[first_part] * k_block.part[first_part];
            VLMFAST_UNROLL
            for (int part = first_part + 1; part < first_part + kPartsInChain; ++part) {
              chain = multiply_add(q_block.part[part], k_block.part[part], chain);
            }
            sums[i] = sums[i] + chain;
          }
        }
      });
      const Float dots = sums_of(sums);
      std::memcpy(args.weights + head * row_size + first, &dots, sizeof(dots));
    }
  }
}

VLMFAST_INLINE void softmax(float* row, int64_t tokens, const bool* valid, float exponent_scale) {
  const int64_t size = padded(tokens);
  if (valid != nullptr) {
    bool any = false;
    for (int64_t token = 0; token < tokens; ++token) {
      if (!valid[token]) row[token] = -__builtin_inff();
      any = any || valid[token];
    }
    if (!any) {
      for (int64_t token = 0; token < size; ++token) row[token] = 0.0f;
      return;
    }
  }
  for (int64_t token = tokens; token < size; ++token) row[token] = -__builtin_inff();
  Float largest = Float{} - __builtin_inff(), sum = {};
  for (int64_t token = 0; token < size; token += kLanes) {
    largest = larger(load_unaligned<Float>(row + token), largest);
  }
  largest = Float{} + largest_lane(largest);
  for (int64_t token = 0; token < size; token += kLanes) {
    const Float weight = weight_of(load_unaligned<Float>(row + token), largest, exponent_scale);
    std::memcpy(row + token, &weight, sizeof(weight));
    sum = sum + weight;
  }
  const Float inverse = Float{} + 1.0f / sum_of_lanes(sum);
  for (int64_t token = 0; token < size; token += kLanes) {
    const Float weight = load_unaligned<Float>(row + token) * inverse;
    std::memcpy(row + token, &weight, sizeof(weight));
  }
}

template <class T>
void row(const RowAttention& args, int64_t begin, int64_t end, float* query) {
  const int64_t query_size = padded(args.head_dim), row_size = padded(args.tokens);
  for (int64_t head = begin; head < end; ++head) {
    const T* from = row_of<T>(args.query, head, 0);
    float* to = query + (head - begin) * query_size;
    each_block(args.head_dim, [&](int64_t offset, auto count) {
      store(to + offset, load(from + offset, count) * sign_of(args.softmax_scale));
    });
  }
  // Follows the layout of the keys: all heads together if the heads of a token are adjacent, else one head after
  // another.
  const int64_t together = args.key.head_stride < args.key.token_stride ? end - begin : 1;
  for (int64_t head = begin; head < end; head += together) {
    row_dots<T>(args, head, head + together, query + (head - begin) * query_size);
  }
  for (int64_t head = begin; head < end; ++head) {
    softmax(args.weights + head * row_size, args.tokens, args.valid, exponent_scale(args.softmax_scale));
  }
}

// ---- the columns of the map ----

// The attention map is computed in strips of rows that fit in the L2 cache. A strip's dots become weights in place, and
// its columns are summed once the sums of its rows are known. A strip is stored panel by panel, as the tiles write it:
// [panel][row][kPanel].
constexpr int kPanel = kTileVectors * kLanes;
constexpr int64_t kStripFloats = 64 << 10;  // 256 kB
constexpr int64_t kMostRows = 48;

constexpr int64_t panels_of(int64_t tokens) { return (tokens + kPanel - 1) / kPanel; }
constexpr int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// Returns the number of rows in a strip for a segment of `tokens` tokens.
VLMFAST_INLINE int64_t strip_rows(int64_t tokens) {
  const int64_t rows = kStripFloats / (panels_of(tokens) * kPanel) / kTileRows * kTileRows;
  return rows < kTileRows ? kTileRows : rows < kMostRows ? rows : kMostRows;
}

struct Workspace {
  float *keys, *strip;    // (panels, D, kPanel), (panels, rows, kPanel)
  float* queries;         // (rows / kTileRows, D, kTileRows)
  float *largest, *sums;  // (rows, kLanes)

  Workspace(float* at, int64_t size, int64_t tokens, int64_t rows) {
    const int64_t columns = panels_of(tokens) * kPanel;
    keys = at;
    strip = keys + columns * size;
    largest = strip + columns * rows;
    sums = largest + rows * kLanes;
    queries = sums + rows * kLanes;
  }
};

// Computes the dots of a strip, and the maximum of each row per lane.
VLMFAST_INLINE void strip_dots(const Workspace& at, int64_t rows, int64_t size, int64_t tokens) {
  for (int64_t i = 0; i < rows * kLanes; ++i) at.largest[i] = -__builtin_inff();
  for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
    const int64_t left = tokens - panel * kPanel;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      Float dots[kTileRows][kTileVectors];
      multiply(at.queries + first * size, at.keys + panel * kPanel * size, size, dots);
      float* to = at.strip + (panel * rows + first) * kPanel;
      std::memcpy(to, dots, sizeof(dots));
      if (left < kPanel) {  // mask the columns beyond the last token
        for (int r = 0; r < kTileRows; ++r) {
          for (int64_t column = left; column < kPanel; ++column) to[r * kPanel + column] = -__builtin_inff();
        }
        std::memcpy(dots, to, sizeof(dots));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        float* most = at.largest + (first + r) * kLanes;
        const Float largest = larger(dots[r][0], larger(dots[r][1], load_unaligned<Float>(most)));
        std::memcpy(most, &largest, sizeof(largest));
      }
    }
  }
}

// Turns the dots of a strip into weights, and writes the inverse sum of each row to every lane of `sums`: 0 for the
// rows from `count` on, which are padding.
VLMFAST_INLINE void strip_weights(const Workspace& at, int64_t rows, int64_t count, int64_t tokens,
                                  float exponent_scale) {
  for (int64_t row = 0; row < rows; ++row) {
    const Float largest = Float{} + largest_lane(load_unaligned<Float>(at.largest + row * kLanes));
    std::memcpy(at.largest + row * kLanes, &largest, sizeof(largest));
    std::memset(at.sums + row * kLanes, 0, sizeof(Float));
  }
  float* weights = at.strip;
  for (int64_t panel = 0; panel < panels_of(tokens); ++panel) {
    for (int64_t row = 0; row < rows; ++row, weights += kPanel) {
      const Float largest = load_unaligned<Float>(at.largest + row * kLanes);
      Float sum = load_unaligned<Float>(at.sums + row * kLanes);
      VLMFAST_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        const Float weight = weight_of(load_unaligned<Float>(weights + v * kLanes), largest, exponent_scale);
        std::memcpy(weights + v * kLanes, &weight, sizeof(weight));
        sum = sum + weight;
      }
      std::memcpy(at.sums + row * kLanes, &sum, sizeof(sum));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float sum = sum_of_lanes(load_unaligned<Float>(at.sums + row * kLanes));
    const Float inverse = Float{} + (row < count ? 1.0f / sum : 0.0f);
    std::memcpy(at.sums + row * kLanes, &inverse, sizeof(inverse));
  }
}

VLMFAST_INLINE void add_columns(const Workspace& at, int64_t rows, int64_t tokens, float* columns) {
  const float* weights = at.strip;
  for (int64_t panel = 0; panel < panels_of(tokens); ++panel, columns += kPanel) {
    Float sums[kTileVectors] = {};
    for (int64_t row = 0; row < rows; ++row, weights += kPanel) {
      const Float inverse = load_unaligned<Float>(at.sums + row * kLanes);
      VLMFAST_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        sums[v] = multiply_add(load_unaligned<Float>(weights + v * kLanes), inverse, sums[v]);
      }
    }
    VLMFAST_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      const Float sum = load_unaligned<Float>(columns + v * kLanes) + sums[v];
      std::memcpy(columns + v * kLanes, &sum, sizeof(sum));
    }
  }
}

template <class T>
void received(const ReceivedAttention& args, const AttentionPart* parts, int64_t count, float* workspace) {
  const int64_t size = args.head_dim;
  const float sign = sign_of(args.softmax_scale), scale = exponent_scale(args.softmax_scale);
  for (int64_t i = 0; i < count; ++i) {
    const AttentionPart& part = parts[i];
    const int64_t tokens = part.end - part.begin, most_rows = strip_rows(tokens);
    const Workspace at(workspace, size, tokens, most_rows);
    if (i == 0 || parts[i - 1].head != part.head || parts[i - 1].begin != part.begin) {
      pack<kPanel, T>(tokens, size, [&](int64_t token) { return row_of<T>(args.key, part.head, part.begin + token); },
                      1.0f, at.keys);
    }
    std::memset(part.sums, 0, padded(tokens) * sizeof(float));
    for (int64_t first = part.first_row; first < part.last_row; first += most_rows) {
      const int64_t left = part.last_row - first, present = left < most_rows ? left : most_rows;
      const int64_t rows = whole_tiles(present);
      pack<kTileRows, T>(present, size, [&](int64_t row) { return row_of<T>(args.query, part.head, first + row); },
                         sign, at.queries);
      strip_dots(at, rows, size, tokens);
      strip_weights(at, rows, present, tokens, scale);
      add_columns(at, rows, tokens, part.sums);
    }
  }
}

int64_t received_workspace(int64_t size, int64_t longest) {
  // The strip is sized for any segment: a shorter one has fewer columns, but may have more rows.
  const int64_t columns = panels_of(longest) * kPanel;
  const int64_t strip = columns * kTileRows < kStripFloats ? kStripFloats : columns * kTileRows;
  return columns * size + strip + kMostRows * (2 * kLanes + size);
}

}  // namespace

template <>
AttentionScoresKernels kernels_at<AttentionScoresKernels, CpuLevel::VLMFAST_ISA>() {
  return {VLMFAST_BY_DTYPE(row), VLMFAST_BY_DTYPE(received), received_workspace};
}

}  // namespace vlmfast
