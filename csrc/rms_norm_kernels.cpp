// The arithmetic of RMSNorm on the CPU, compiled once per instruction set (see types.h); every one gives the same bits.
//
// The forward rounds where Hugging Face's module rounds and sums as torch does, and so equals it to the bit.
#include "rms_norm_kernels.h"

#include "vector.h"

namespace vlmfast {
namespace {

// How many rows after the one at hand to fetch into the cache. The processor's own prefetcher stops at the end of a
// 4 kB page, which is a row of 2048 bfloat16: without this 600 x 2048 takes 1.7x as long when it comes from beyond L2.
template <int N>
VLMFAST_INLINE int64_t rows_ahead(int64_t size) {
  constexpr int64_t kElements = 4096;
  return size < kElements / N ? kElements / size : N;
}

// 1 / sqrt(mean + eps) of the sums of N rows.
template <int N>
VLMFAST_INLINE void inverse_roots(const float* sums, int64_t size, float eps, float (&result)[N]) {
  for (int n = 0; n < N; ++n) result[n] = 1.0f / __builtin_sqrtf(sums[n] / static_cast<float>(size) + eps);
}

// ---- forward ----

template <class T, Variant variant>
VLMFAST_INLINE Block normalise(const Block& x, float inverse_rms, const Block& weight) {
  if constexpr (variant == Variant::kGemma) return x * inverse_rms * (1.0f + weight);
  return weight * round_to<T>(x * inverse_rms);
}

template <class T, Variant variant, bool add, int N>
VLMFAST_INLINE void forward_rows(const RmsNormForward& args, int64_t row, int64_t size) {
  const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
  const T* residual = static_cast<const T*>(args.residual);
  const T* weight = static_cast<const T*>(args.weight);
  T* y = static_cast<T*>(args.y) + row * size;
  T* new_residual = static_cast<T*>(args.new_residual);
  if constexpr (add) {
    residual += row * args.residual_row_stride;
    new_residual += row * size;
  }

  float sums[N], inverse_rms[N];
  const auto squares = [&](int64_t offset, auto count, Block(&square)[N]) VLMFAST_INLINE_LAMBDA {
    for (int n = 0; n < N; ++n) {
      Block value = load(x + n * args.x_row_stride + offset, count);
      if constexpr (add) {
        T* sum = new_residual + n * size + offset;
        store(sum, load(residual + n * args.residual_row_stride + offset, count) + value, count);
        value = load(sum, count);
      }
      square[n] = value * value;
    }
  };
  torch_sum<T>(size, squares, sums);
  inverse_roots(sums, size, args.eps, inverse_rms);

  const int64_t ahead = rows_ahead<N>(size);
  each_block(size, [&](int64_t offset, auto count) VLMFAST_INLINE_LAMBDA {
    const Block w = load(weight + offset, count);
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(x + (n + ahead) * args.x_row_stride + offset);
      __builtin_prefetch(y + (n + ahead) * size + offset, 1);
      if constexpr (add) {
        __builtin_prefetch(residual + (n + ahead) * args.residual_row_stride + offset);
        __builtin_prefetch(new_residual + (n + ahead) * size + offset, 1);
      }
      const Block value = load((add ? new_residual + n * size : x + n * args.x_row_stride) + offset, count);
      store(y + n * size + offset, normalise<T, variant>(value, inverse_rms[n], w), count);
    }
  });
}

template <class T, Variant variant, bool add>
void forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  // With the addition four streams are read or written already; two rows of each evict one another from L1.
  constexpr int kTogether = add ? 1 : 2;
  in_groups<kTogether>(begin, end, args.size, [&](int64_t row, auto rows, int64_t size) VLMFAST_INLINE_LAMBDA {
    forward_rows<T, variant, add, rows>(args, row, size);
  });
}

// ---- backward ----

// The formula of vlmfast/ops/rms_norm.py, with both of its sums over a row taken in one pass.
template <class T, Variant variant, int N>
VLMFAST_INLINE void backward_rows(const RmsNormBackward& args, int64_t row, int64_t size, float* partial) {
  const T* grad_output = static_cast<const T*>(args.grad_output) + row * args.grad_output_row_stride;
  const T* x = static_cast<const T*>(args.x) + row * args.x_row_stride;
  const T* weight = static_cast<const T*>(args.weight);
  const T* grad_residual = static_cast<const T*>(args.grad_residual);
  if (grad_residual != nullptr) grad_residual += row * args.grad_residual_row_stride;
  T* grad_x = static_cast<T*>(args.grad_x) + row * size;
  const auto weighted = [&](const Block& grad, const Block& w)
                            VLMFAST_INLINE_LAMBDA { return variant == Variant::kGemma ? grad * (1.0f + w) : grad * w; };

  float sums[2 * N], inverse_rms[N], mean_product[N];  // mean_product: of the weighted gradient and the quotient
  const auto terms = [&](int64_t offset, auto count, Block(&term)[2 * N]) VLMFAST_INLINE_LAMBDA {
    const Block w = load(weight + offset, count);
    for (int n = 0; n < N; ++n) {
      const Block value = load(x + n * args.x_row_stride + offset, count);
      const Block grad = load(grad_output + n * args.grad_output_row_stride + offset, count);
      term[n] = value * value;
      term[N + n] = weighted(grad, w) * value;
    }
  };
  torch_sum<T>(size, terms, sums);
  inverse_roots(sums, size, args.eps, inverse_rms);
  for (int n = 0; n < N; ++n) mean_product[n] = sums[N + n] / static_cast<float>(size) * inverse_rms[n];

  const int64_t ahead = rows_ahead<N>(size);
  each_block(size, [&](int64_t offset, auto count) VLMFAST_INLINE_LAMBDA {
    const Block w = load(weight + offset, count);
    Block weight_grad = partial != nullptr ? load(partial + offset) : Block{};
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(x + (n + ahead) * args.x_row_stride + offset);
      __builtin_prefetch(grad_output + (n + ahead) * args.grad_output_row_stride + offset);
      __builtin_prefetch(grad_x + (n + ahead) * size + offset, 1);
      const Block grad = load(grad_output + n * args.grad_output_row_stride + offset, count);
      const Block normed = load(x + n * args.x_row_stride + offset, count) * inverse_rms[n];
      Block result = (weighted(grad, w) - normed * mean_product[n]) * inverse_rms[n];
      if (grad_residual != nullptr) {
        result = result + load(grad_residual + n * args.grad_residual_row_stride + offset, count);
      }
      store(grad_x + n * size + offset, result, count);
      weight_grad = weight_grad + grad * (variant == Variant::kLlama ? round_to<T>(normed) : normed);
    }
    if (partial != nullptr) store(partial + offset, weight_grad);
  });
}

// Adds up the weight's gradient as torch_sum adds up a chain: 16 rows, 16 such sums, the rest.
VLMFAST_INLINE void carry(float* partial, int64_t size, int64_t rows) {
  const int64_t stride = rms_norm_partial_size(size) / kRmsNormPartialLevels;
  for (int level = 1; level < kRmsNormPartialLevels && rows % kRmsNormPartialStep == 0; ++level) {
    float* from = partial + (level - 1) * stride;
    for (int64_t offset = 0; offset < stride; offset += kBlock) {
      store(from + stride + offset, load(from + stride + offset) + load(from + offset));
      store(from + offset, Block{});
    }
    rows /= kRmsNormPartialStep;
  }
}

template <class T, Variant variant>
void backward(const RmsNormBackward& args, int64_t begin, int64_t end, float* partial) {
  for (int64_t row = begin; row < end;) {
    const int64_t stop = row + kRmsNormPartialStep < end ? row + kRmsNormPartialStep : end;
    in_groups<2>(row, stop, args.size, [&](int64_t first, auto rows, int64_t size) VLMFAST_INLINE_LAMBDA {
      backward_rows<T, variant, rows>(args, first, size, partial);
    });
    row = stop;
    if (partial != nullptr) carry(partial, args.size, row - begin);
  }
}

template <class T>
void sum_partials(int64_t size, const float* partials, int64_t count, T* grad_weight) {
  const int64_t stride = rms_norm_partial_size(size) / kRmsNormPartialLevels;
  each_block(size, [&](int64_t offset, auto elements) {
    Block sum = load(partials + offset);
    for (int64_t i = 1; i < count * kRmsNormPartialLevels; ++i) sum = sum + load(partials + i * stride + offset);
    store(grad_weight + offset, sum, elements);
  });
}

// ---- by dtype and variant ----

void any_forward(const RmsNormForward& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const bool llama = args.variant == Variant::kLlama;
    if (args.residual == nullptr) {
      llama ? forward<T, Variant::kLlama, false>(args, begin, end)
            : forward<T, Variant::kGemma, false>(args, begin, end);
    } else {
      llama ? forward<T, Variant::kLlama, true>(args, begin, end) : forward<T, Variant::kGemma, true>(args, begin, end);
    }
  });
}

void any_backward(const RmsNormBackward& args, int64_t begin, int64_t end, float* partial) {
  for_dtype(args.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    args.variant == Variant::kLlama ? backward<T, Variant::kLlama>(args, begin, end, partial)
                                    : backward<T, Variant::kGemma>(args, begin, end, partial);
  });
}

void any_sum_partials(Dtype dtype, int64_t size, const float* partials, int64_t count, void* grad_weight) {
  for_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    sum_partials(size, partials, count, static_cast<T*>(grad_weight));
  });
}

}  // namespace

template <>
RmsNormKernels rms_norm_kernels<CpuLevel::VLMFAST_ISA>() {
  return {any_forward, any_backward, any_sum_partials};
}

}  // namespace vlmfast
