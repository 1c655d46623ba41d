// The arithmetic of RMSNorm on the CPU, compiled once per instruction set (see types.h); every one gives the same bits.
//
// The forward rounds where Hugging Face's module rounds and sums as torch does, and so equals it to the bit.
#include "rms_norm/cpu_kernels.h"

#include "common/partial_sums.h"
#include "common/quick_bfloat16.h"
#include "common/rms.h"

namespace vlmfast {
namespace {

// How many rows after the one at hand to fetch into the cache. The processor's own prefetcher stops at the end of a
// 4 kB page, which is a row of 2048 bfloat16: without this the forward of 600 x 2048 takes 1.04x as long.
template <int N>
VLMFAST_INLINE int64_t rows_ahead(int64_t hidden) {
  constexpr int64_t kElements = 4096;
  return hidden < kElements / N ? kElements / hidden : N;
}

// Whether rows go several together. Where float16 is converted in software that makes no row faster, and 340 kB of
// kernels 1900, which take compilers a minute. A weight of another type is rare, and kernels of single rows compile in a
// quarter of the time.
template <class T, class Weight>
constexpr bool kGrouped = std::is_same_v<T, Weight> && (kHalfInstructions || !std::is_same_v<T, Float16>);

// What a rounded row gives when a weight has multiplied it has the wider type, which is the weight's.
template <class T, class Weight, bool rounded>
using Output = std::conditional_t<rounded, Weight, T>;

// What multiplies a row. The offset is an argument of the kernels, because one more addition costs nothing that can be
// measured, and a kernel for each variant a third of the time to compile them all.
template <bool rounded, class Weight, class Count>
VLMFAST_INLINE Block load_weight(const Weight* weight, float weight_offset, Count count) {
  return rounded ? load(weight, count) : weight_offset + load(weight, count);
}

// The normalised block as it meets the weight.
template <class T, bool rounded>
VLMFAST_INLINE Block before_weight(const Block& normed) {
  return rounded ? round_to<T>(normed) : normed;
}

// ---- forward ----

// The least magnitude of an input for which no rounding of a row meets a subnormal and the squares are exact.
// `least_factor` is that of a weight, or of 1 + weight. Zeros count in neither.
template <class T, bool add>
VLMFAST_INLINE float least_quick(float inverse_rms, float least_factor) {
  constexpr float kNormal = 0x1p-124f;  // four times the least normal number: twice for what roundings take away
  constexpr float kCancelled = 256;     // a sum of bfloat16 that is not zero is at least 2^-8 of the lesser
  const float least = kNormal / (inverse_rms * (least_factor < 1 ? least_factor : 1));
  return (add ? kCancelled : 1) * (least < Quick<T>::kExactSquare ? Quick<T>::kExactSquare : least);
}

template <class T>
float least_factor(const RmsNormForward& args) {
  if (args.weight_offset == 1) return 0x1p-9f;  // 1 + weight, for every bfloat16 but -1
  typename Quick<T>::Least least;
  each_block(args.hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
    least.see(static_cast<const T*>(args.weight) + offset, count);
  });
  return least.value();
}

// Where the rows of a call lie. Copied, because the compiler must assume that stores alias `args`.
template <class T, class Weight, class Y>
struct ForwardRows {
  const T *x, *residual;
  const Weight* weight;
  Y* y;
  T* new_residual;
  int64_t hidden, x_stride, residual_stride;
  float weight_offset;

  VLMFAST_INLINE ForwardRows(const RmsNormForward& args, int64_t row, int64_t row_size)
      : x(static_cast<const T*>(args.x) + row * args.x_row_stride),
        residual(static_cast<const T*>(args.residual) + row * args.residual_row_stride),
        weight(static_cast<const Weight*>(args.weight)),
        y(static_cast<Y*>(args.y) + row * row_size),
        new_residual(static_cast<T*>(args.new_residual) + row * row_size),
        hidden(row_size),
        x_stride(args.x_row_stride),
        residual_stride(args.residual_row_stride),
        weight_offset(args.weight_offset) {}
};

template <int N>
struct Scales {
  float inverse_rms[N];
  bool quick;  // whether the processor may round what they scale
};

// The first pass: adds, and sums the squares. With `quick` the processor rounds the sums; where it could have flushed
// one the result is not quick either, and all is to be done again.
template <class T, bool add, bool quick, int N, class Rows>
VLMFAST_INLINE Scales<N> scales_of(const Rows& rows, float eps, float factor) {
  float sums[N];
  typename Quick<T>::Least least[N];
  const auto squares = VLMFAST_LAMBDA(int64_t offset, auto count, Block(&total)[N]) {
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      const T* x = rows.x + n * rows.x_stride + offset;
      Block value = load(x, count);
      if constexpr (quick) least[n].see(x, count);
      if constexpr (add) {
        const T* residual = rows.residual + n * rows.residual_stride + offset;
        T* sum = rows.new_residual + n * rows.hidden + offset;
        value = load(residual, count) + value;
        if constexpr (quick) {
          least[n].see(residual, count);
          Quick<T>::template store<false>(sum, value, count);
        } else {
          store(sum, value, count);
        }
        value = load(sum, count);
      }
      total[n] = quick ? fused(value, value, total[n]) : total[n] + value * value;
    }
  };
  torch_sum<T>(rows.hidden, sums, squares);
  Scales<N> scales;
  inverse_roots(sums, rows.hidden, eps, scales.inverse_rms);
  scales.quick = quick;
  if constexpr (quick) {
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      scales.quick = scales.quick & !least[n].is_below(least_quick<T, add>(scales.inverse_rms[n], factor));
    }
  }
  return scales;
}

// The second pass: scales. It loads all rows before it stores any: where rows lie a multiple of 4 kB apart, a load that
// follows a store of the same offset seems to depend on it, which cost 5 % of 600 x 2048.
template <class T, bool rounded, bool add, bool quick, int N, class Rows>
VLMFAST_INLINE void scale(const Rows& rows, const float (&inverse_rms)[N]) {
  constexpr bool kInOrder = quick && rounded;  // rounded twice by the processor
  const int64_t ahead = rows_ahead<N>(rows.hidden);
  each_block(rows.hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
    Block w, normed[N];
    if constexpr (kInOrder) {
      w = Quick<T>::load_in_order(rows.weight + offset, count);
    } else {
      w = load_weight<rounded>(rows.weight + offset, rows.weight_offset, count);
    }
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(rows.x + (n + ahead) * rows.x_stride + offset);
      if constexpr (add) {
        __builtin_prefetch(rows.residual + (n + ahead) * rows.residual_stride + offset);
        __builtin_prefetch(rows.new_residual + (n + ahead) * rows.hidden + offset, 1);
      }
      const T* from = add ? rows.new_residual + n * rows.hidden : rows.x + n * rows.x_stride;
      normed[n] = load(from + offset, count) * inverse_rms[n];
    }
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      auto* to = rows.y + n * rows.hidden + offset;
      if constexpr (kInOrder) {
        Quick<T>::template store<true>(to, Quick<T>::round(normed[n]) * w, count);
      } else if constexpr (quick) {
        Quick<T>::template store<false>(to, normed[n] * w, count);
      } else {
        store(to, before_weight<T, rounded>(normed[n]) * w, count);
      }
    }
  });
}

template <class T, class Weight, bool rounded, bool add>
void forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  // More rows hide the latency of their sums and share the weight, until they do not fit into L1 with their successors.
  constexpr int kWide = !kGrouped<T, Weight> ? 1 : add ? 2 : 3;
  constexpr bool kQuick = Quick<T>::kExists;
  const float eps = args.eps;
  float factor = 0;
  if constexpr (kQuick) factor = least_factor<T>(args);
  in_groups<kWide>(begin, end, args.hidden, VLMFAST_LAMBDA(int64_t first, int64_t stop, auto rows, int64_t hidden) {
    for (int64_t row = first; row < stop; row += rows) {
      const ForwardRows<T, Weight, Output<T, Weight, rounded>> at(args, row, hidden);
      Scales<rows> scales = scales_of<T, add, kQuick, rows>(at, eps, factor);
      if (kQuick && !scales.quick) scales = scales_of<T, add, false, rows>(at, eps, factor);
      if (kQuick && scales.quick) {
        scale<T, rounded, add, kQuick, rows>(at, scales.inverse_rms);
      } else {
        scale<T, rounded, add, false, rows>(at, scales.inverse_rms);
      }
    }
  });
}

// ---- backward ----

// The formula of the definition in vlmfast/ops, with both sums over a row taken in one pass.
template <class T, class Weight, bool rounded, int N>
VLMFAST_INLINE void backward_rows(const RmsNormBackward& args, int64_t row, int64_t hidden, float* partial) {
  const auto* grad_output =
      static_cast<const Output<T, Weight, rounded>*>(args.grad_output) + row * args.grad_output_row_stride;
  const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
  const Weight* weight = static_cast<const Weight*>(args.weight);
  const T* grad_residual = static_cast<const T*>(args.grad_residual);
  if (grad_residual != nullptr) grad_residual += row * args.grad_residual_row_stride;
  T* grad_x = static_cast<T*>(args.grad_x) + row * hidden;

  float sums[2 * N], inverse_rms[N], projection[N];  // projection: mean of the weighted gradient times the normed row
  const auto terms = VLMFAST_LAMBDA(int64_t offset, auto count, Block(&total)[2 * N]) {
    const Block w = load_weight<rounded>(weight + offset, args.weight_offset, count);
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      const Block value = load(x + n * args.x_row_stride + offset, count);
      const Block grad = load(grad_output + n * args.grad_output_row_stride + offset, count);
      total[n] = total[n] + value * value;
      total[N + n] = total[N + n] + grad * w * value;
    }
  };
  torch_sum<T>(hidden, sums, terms);
  inverse_roots(sums, hidden, args.eps, inverse_rms);
  VLMFAST_UNROLL
  for (int n = 0; n < N; ++n) projection[n] = sums[N + n] / static_cast<float>(hidden) * inverse_rms[n];

  const int64_t ahead = rows_ahead<N>(hidden);
  each_block(hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block w = load_weight<rounded>(weight + offset, args.weight_offset, count);
    Block weight_grad = partial != nullptr ? load(partial + offset) : Block{};
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(x + (n + ahead) * args.x_row_stride + offset);
      __builtin_prefetch(grad_output + (n + ahead) * args.grad_output_row_stride + offset);
      __builtin_prefetch(grad_x + (n + ahead) * hidden + offset, 1);
      const Block grad = load(grad_output + n * args.grad_output_row_stride + offset, count);
      const Block normed = load(x + n * args.x_row_stride + offset, count) * inverse_rms[n];
      Block result = (grad * w - normed * projection[n]) * inverse_rms[n];
      if (grad_residual != nullptr) {
        result = result + load(grad_residual + n * args.grad_residual_row_stride + offset, count);
      }
      store(grad_x + n * hidden + offset, result, count);
      weight_grad = weight_grad + grad * before_weight<T, rounded>(normed);
    }
    if (partial != nullptr) store(partial + offset, weight_grad);
  });
}

template <class T, class Weight, bool rounded>
void backward(const RmsNormBackward& args, int64_t begin, int64_t end, float* partial) {
  for (int64_t row = begin; row < end;) {
    const int64_t stop = row + kSumStep < end ? row + kSumStep : end;
    in_groups<kGrouped<T, Weight> ? 2 : 1>(row, stop, args.hidden,
                                           VLMFAST_LAMBDA(int64_t first, int64_t last, auto rows, int64_t hidden) {
                                             for (; first < last; first += rows)
                                               backward_rows<T, Weight, rounded, rows>(args, first, hidden, partial);
                                           });
    row = stop;
    if (partial != nullptr) carry(partial, args.hidden, row - begin);
  }
}

// The types of rows and weight, whose blocks must be in one order.
template <class T, bool wide_weight>
using Row = std::conditional_t<wide_weight && std::is_same_v<T, BFloat16>, OrderedBFloat16, T>;
template <class T, bool wide_weight>
using WeightOf = std::conditional_t<wide_weight, float, T>;

// Float32 rounds nothing.
template <class T, bool wide_weight, bool rounded, bool add>
constexpr auto forward_of =
    forward<Row<T, wide_weight>, WeightOf<T, wide_weight>, rounded && !std::is_same_v<T, float>, add>;

template <class T, bool wide_weight, bool rounded>
constexpr auto backward_of =
    backward<Row<T, wide_weight>, WeightOf<T, wide_weight>, rounded && !std::is_same_v<T, float>>;

#define VLMFAST_FORWARD(wide_weight, add) \
  {VLMFAST_BY_DTYPE(forward_of, wide_weight, false, add), VLMFAST_BY_DTYPE(forward_of, wide_weight, true, add)}
#define VLMFAST_BACKWARD(wide_weight) \
  {VLMFAST_BY_DTYPE(backward_of, wide_weight, false), VLMFAST_BY_DTYPE(backward_of, wide_weight, true)}

}  // namespace

template <>
RmsNormKernels kernels_at<RmsNormKernels, CpuLevel::VLMFAST_ISA>() {
  return {{{VLMFAST_FORWARD(false, false), VLMFAST_FORWARD(false, true)},
           {VLMFAST_FORWARD(true, false), VLMFAST_FORWARD(true, true)}},
          {VLMFAST_BACKWARD(false), VLMFAST_BACKWARD(true)},
          VLMFAST_BY_DTYPE(sum_partials)};
}

}  // namespace vlmfast
