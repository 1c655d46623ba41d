// The token merge on the CPU, compiled once per instruction set (see types.h).
#include "token_merge/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

// ---- the largest scores ----

// Maps floats to unsigned integers in the same order. The bits of a float increase with positive values and decrease
// with negative ones.
VLMFAST_INLINE Bits ordered_bits(Float scores) {
  constexpr uint32_t kSign = 0x80000000u;
  const Bits bits = (Bits)(scores + 0.0f);  // -0 + 0 is 0
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

template <class T>
bool order(const void* scores, int64_t count, uint32_t* keys) {
  const T* const from = static_cast<const T*>(scores);
  Bits invalid = {};
  const auto step = VLMFAST_LAMBDA(const T* at) {
    const Float values = load_in_order(at);
    invalid |= (Bits)(values != values);
    return ordered_bits(values);
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Bits bits = step(from + at);
    std::memcpy(keys + at, &bits, sizeof(bits));
  }
  T rest[kLanes] = {};
  std::memcpy(rest, from + at, (count - at) * sizeof(T));
  const Bits bits = step(rest);
  std::memcpy(keys + at, &bits, (count - at) * sizeof(uint32_t));
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= invalid[lane];
  return any == 0;
}

// ---- the most similar targets ----

// Cosines are computed in double precision and then rounded, so that equal targets give equal cosines, and so ties, on
// every instruction set.
constexpr int kPanel = kTileVectors * kDoubles;
constexpr int64_t panel_columns(int64_t targets) { return (targets + kPanel - 1) / kPanel * kPanel; }

int64_t packed_targets(int64_t targets, int64_t head_dim) { return panel_columns(targets) * (head_dim + 1); }

// Returns 1 / |row|, or 0 for a row of zeros, whose cosine with every row is then 0.
template <class T>
VLMFAST_INLINE double inverse_length(const T* row, int64_t size) {
  const double sum = square_length(row, size);
  return sum > 0 ? 1 / __builtin_sqrt(sum) : 0.0;
}

// Packs the targets of each sequence, followed by their inverse lengths.
template <class T>
void pack_targets(const MergeSlots& args, int64_t batch) {
  const int64_t columns = panel_columns(args.targets);
  for (int64_t b = 0; b < batch; ++b) {
    const auto target = [&](int64_t row) {
      return reinterpret_cast<const T*>(args.target[b * args.targets + (row < args.targets ? row : 0)]);
    };
    double* to = args.panels + b * packed_targets(args.targets, args.head_dim);
    pack<kPanel, T>(args.targets, args.head_dim, target, 1.0f, to);
    to += columns * args.head_dim;
    for (int64_t column = 0; column < columns; ++column) to[column] = inverse_length(target(column), args.head_dim);
  }
}

// Assigns up to kTileRows tokens of one sequence.
template <class T>
VLMFAST_INLINE void assign_tile(const MergeSlots& args, const double* panels, int64_t begin, int64_t count,
                                double* room) {
  const auto row_at = [&](int64_t row) { return reinterpret_cast<const T*>(args.joins[begin + row]); };
  pack<kTileRows, T>(count, args.head_dim, row_at, 1.0f, room);
  float best[kTileRows];
  int32_t slot[kTileRows];
  double inverse[kTileRows] = {};
  for (int64_t row = 0; row < kTileRows; ++row) {
    best[row] = -__builtin_inff();
    slot[row] = static_cast<int32_t>(args.targets);
    if (row < count) inverse[row] = inverse_length(row_at(row), args.head_dim);
  }
  const double* target_inverse = panels + panel_columns(args.targets) * args.head_dim;
  for (int64_t first = 0; first < args.targets; first += kPanel, panels += kPanel * args.head_dim) {
    Double dots[kTileRows][kTileVectors];
    multiply(room, panels, args.head_dim, dots);
    const int64_t left = args.targets - first, present = left < kPanel ? left : kPanel;
    for (int64_t row = 0; row < count; ++row) {
      double cosines[kPanel];
      for (int v = 0; v < kTileVectors; ++v) {
        const Double of_targets = load_unaligned<Double>(target_inverse + first + v * kDoubles);
        dots[row][v] = dots[row][v] * inverse[row] * of_targets;
      }
      std::memcpy(cosines, dots[row], sizeof(cosines));
      for (int64_t column = 0; column < present; ++column) {
        const float cosine = static_cast<float>(cosines[column]);
        if (cosine > best[row]) {
          best[row] = cosine;
          slot[row] = static_cast<int32_t>(args.targets + first + column);
        }
      }
    }
  }
  for (int64_t row = 0; row < count; ++row) args.slots[args.position[begin + row]] = slot[row];
}

template <class T>
void assign(const MergeSlots& args, int64_t begin, int64_t end, double* room) {
  while (begin < end) {
    const int64_t b = begin / args.joining, left = (b + 1) * args.joining - begin;
    int64_t count = left < end - begin ? left : end - begin;
    if (count > kTileRows) count = kTileRows;
    assign_tile<T>(args, args.panels + b * packed_targets(args.targets, args.head_dim), begin, count, room);
    begin += count;
  }
}

// ---- the rows ----

// Adds N rows pairwise, and their total to the sums of some columns.
template <int N, class T>
VLMFAST_INLINE void add_rows(const char* const* rows, int64_t first, int64_t size, float* sums) {
  each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
    Block block[N];
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) block[n] = load(reinterpret_cast<const T*>(rows[n]) + first + offset, count);
    VLMFAST_UNROLL
    for (int apart = 1; apart < N; apart *= 2) {
      VLMFAST_UNROLL
      for (int n = 0; n + apart < N; n += 2 * apart) block[n] = block[n] + block[n + apart];
    }
    store(sums + offset, load(sums + offset) + block[0]);
  });
}

template <class T>
void merge(const MergedRows& args, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;
  constexpr int kTogether = 4;
  float sums[kColumns];
  int64_t joined = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t joined_end = args.joined_end[row], number = joined_end - joined;
    const T* from = reinterpret_cast<const T*>(args.first[row]);
    T* y = reinterpret_cast<T*>(args.y) + row * args.hidden;
    if (number == 0) {
      std::memcpy(y + begin, from + begin, (end - begin) * sizeof(T));
      continue;
    }
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t columns = end - first < kColumns ? end - first : kColumns;
      std::memset(sums, 0, sizeof(sums));
      int64_t at = joined;
      for (; at + kTogether <= joined_end; at += kTogether) {
        add_rows<kTogether, T>(args.joined + at, first, columns, sums);
      }
      for (; at < joined_end; ++at) add_rows<1, T>(args.joined + at, first, columns, sums);
      const float count = static_cast<float>(number);
      each_block(columns, VLMFAST_LAMBDA(int64_t offset, auto elements) {
        const Block target = load(from + first + offset, elements), sum = load(sums + offset);
        store(y + first + offset, args.merge == Merge::kMean ? (target + sum) / (1 + count) : target + sum / count,
              elements);
      });
    }
    joined = joined_end;
  }
}

template <class T>
void divide(const DividedRows& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = reinterpret_cast<const T*>(args.rows[row]);
    T* y = reinterpret_cast<T*>(args.y) + row * args.hidden;
    each_block(args.hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
      store(y + offset, load(from + offset, count) / args.divisors[row], count);
    });
  }
}

}  // namespace

template <>
TokenMergeKernels kernels_at<TokenMergeKernels, CpuLevel::VLMFAST_ISA>() {
  static_assert(kTileRows <= kMergeRoom);
  return {VLMFAST_BY_DTYPE(order),  packed_targets,          VLMFAST_BY_DTYPE(pack_targets),
          VLMFAST_BY_DTYPE(assign), VLMFAST_BY_DTYPE(merge), VLMFAST_BY_DTYPE(divide)};
}

}  // namespace vlmfast
