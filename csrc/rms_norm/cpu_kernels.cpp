// The arithmetic of RMSNorm on the CPU, compiled once per instruction set (see types.h). All give the same bits.
//
// The forward is bit-identical to Hugging Face's module: it rounds where the module rounds and sums in torch's order.
#include "rms_norm/cpu_kernels.h"

#include "common/partial_sums.h"
#include "common/quick_bfloat16.h"
#include "common/rms.h"

namespace vlmfast {
namespace {

// Returns how many rows ahead to prefetch when N rows are processed together. The hardware prefetcher stops at the end
// of a 4 kB page, which is one row of 2048 bfloat16: without prefetches the forward of 600 x 2048 takes 1.04x as long.
template <int N>
VLMFAST_INLINE int64_t rows_ahead(int64_t hidden) {
  constexpr int64_t kElements = 4096;
  return hidden < kElements / N ? kElements / hidden : N;
}

// Whether several rows are processed together. If float16 is converted in software, grouping speeds up no row, and it
// grows the kernels from 340 kB to 1900 kB, which take a minute to compile. A weight of another type than the rows is
// rare, so its kernels take single rows, which compile in a quarter of the time.
template <class T, class Weight>
constexpr bool kGrouped = std::is_same_v<T, Weight> && (kHalfInstructions || !std::is_same_v<T, Float16>);

// The type of the output. A rounded row times the weight has the wider type of the two, which is the weight's.
template <class T, class Weight, bool rounded>
using Output = std::conditional_t<rounded, Weight, T>;

// Loads the factors of a row: the weight plus its offset. The offset is a run-time argument, because the addition costs
// nothing measurable, whereas a kernel per variant would take a third of the compile time of all kernels.
template <bool rounded, class Weight, class Count>
VLMFAST_INLINE Block load_weight(const Weight* weight, float weight_offset, Count count) {
  return rounded ? load(weight, count) : weight_offset + load(weight, count);
}

// ---- forward ----

// Returns a bound on the nonzero inputs of a row: if none is smaller in magnitude, no rounding of the row meets a
// subnormal, and the squares are exact. `least_factor` is the least nonzero magnitude of the weight, or of 1 + weight.
template <class T, bool add>
VLMFAST_INLINE float least_quick(float inverse_rms, float least_factor) {
  constexpr float kNormal = 0x1p-124f;  // four times the least normal number, as a margin for two roundings
  constexpr float kCancelled = 256;     // a nonzero sum of two bfloat16 is at least 2^-8 of the lesser magnitude
  const float least = kNormal / (inverse_rms * (least_factor < 1 ? least_factor : 1));
  return (add ? kCancelled : 1) * (least < Quick<T>::kExactSquare ? Quick<T>::kExactSquare : least);
}

template <class T>
float least_factor(const RmsNormForward& args) {
  if (args.weight_offset == 1) return 0x1p-9f;  // the least nonzero |1 + weight| over all bfloat16 weights
  typename Quick<T>::Least least;
  each_block(args.hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
    least.see(static_cast<const T*>(args.weight) + offset, count);
  });
  return least.value();
}

// The rows of a call, as typed pointers. `args` is copied because the compiler must assume that stores alias it.
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
  bool quick;  // whether Quick may round the scaled rows
};

// The first pass: adds the residual and sums the squares. With `quick`, Quick rounds the new residual. If it could have
// flushed a subnormal, the result has quick = false, and the caller must repeat the pass without it.
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

// The second pass: scales the rows. It loads a block of every row before it stores any: if rows lie a multiple of 4 kB
// apart, the processor takes a load after a store of the same page offset for dependent (4K aliasing), which cost 5 %
// of 600 x 2048.
template <class T, bool rounded, bool add, bool quick, int N, class Rows>
VLMFAST_INLINE void scale(const Rows& rows, const float (&inverse_rms)[N]) {
  constexpr bool kInOrder = quick && rounded;  // Quick rounds twice, so blocks stay in memory order in between
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
        store(to, round_if<T>(rounded, normed[n]) * w, count);
      }
    }
  });
}

template <class T, class Weight, bool rounded, bool add>
void forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  // More rows at a time hide the latency of the sums and share the loads of the weight, as long as they fit into L1
  // together with the prefetched rows.
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

// The formula of the definition in vlmfast/ops, with both sums over a row accumulated in one pass.
template <class T, class Weight, bool rounded, int N>
VLMFAST_INLINE void backward_rows(const RmsNormBackward& args, int64_t row, int64_t hidden, float* partial) {
  const auto* grad_output =
      static_cast<const Output<T, Weight, rounded>*>(args.grad_output) + row * args.grad_output_row_stride;
  const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
  const Weight* weight = static_cast<const Weight*>(args.weight);
  const T* grad_residual = static_cast<const T*>(args.grad_residual);
  if (grad_residual != nullptr) grad_residual += row * args.grad_residual_row_stride;
  T* grad_x = static_cast<T*>(args.grad_x) + row * hidden;

  float sums[2 * N], inverse_rms[N],
      projection[N];  // projection: mean of the weighted gradient times the normalised row
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
      weight_grad = weight_grad + grad * round_if<T>(rounded, normed);
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

// The types of rows and weight. Beside a float32 weight, bfloat16 rows must be loaded in memory order.
template <class T, bool wide_weight>
using Row = std::conditional_t<wide_weight, Ordered<T>, T>;
template <class T, bool wide_weight>
using WeightOf = std::conditional_t<wide_weight, float, T>;

// float32 is never rounded, so it shares the kernels that do not round.
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
