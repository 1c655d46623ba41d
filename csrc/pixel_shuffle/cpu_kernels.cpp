// The arithmetic of the pixel shuffle with a LayerNorm on the CPU, compiled once per instruction set (see types.h). All
// give the same bits.
//
// The forward is bit-identical to torch's layer_norm: it computes moments and rounds in the same order.
#include "pixel_shuffle/cpu_kernels.h"

#include "common/partial_sums.h"
#include "common/torch_moments.h"
#include "common/torch_sum.h"

namespace vlmfast {
namespace {

// Gathers the runs of one token, times the input scale.
template <class T>
VLMFAST_INLINE void gather(const ShuffledNorm& norm, int64_t token, T* to) {
  const char* const* runs = norm.x + token * norm.token_runs;
  const int64_t size = norm.run_size;
  const float input_scale = norm.input_scale;
  for (int64_t run = 0; run < norm.token_runs; ++run, to += size) {
    const T* from = reinterpret_cast<const T*>(runs[run]);
    if (input_scale == 1) {
      std::memcpy(to, from, size * sizeof(T));
    } else {
      each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
        store(to + offset, load(from + offset, count) * input_scale, count);
      });
    }
  }
}

VLMFAST_INLINE Block broadcast(float value) {
  return each_part([&](int) { return Float{} + value; });
}

// ---- forward ----

// Rows are accumulated several at a time, because each step of the recurrence along a row depends on the one before.
constexpr int kTogether = 4;

// The mean and the factor that normalise a row.
struct Scale {
  float mean, inverse_deviation;
};

template <class T, int N>
VLMFAST_INLINE void scales_of(const T* rows, int64_t size, float eps, Scale (&scales)[N]) {
  MeanAndVariance moments[N];
  torch_moments<T, N>(rows, size, size, moments);
  for (int n = 0; n < N; ++n) scales[n] = {moments[n].mean, 1.0f / __builtin_sqrtf(moments[n].variance + eps)};
}

template <class T, int N>
VLMFAST_INLINE void normalise(T* rows, int64_t size, const T* weight, const T* bias, const Scale (&scales)[N]) {
  each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block w = load(weight + offset, count), b = load(bias + offset, count);
    VLMFAST_UNROLL
    for (int n = 0; n < N; ++n) {
      T* row = rows + n * size + offset;
      const Block value = load(row, count), inverse = broadcast(scales[n].inverse_deviation);
      Block normed;
      if constexpr (std::is_same_v<T, float>) {
        normed = (value - broadcast(scales[n].mean)) * inverse;
      } else {  // torch's order for 16-bit types
        normed = fused(value, inverse, broadcast(-scales[n].inverse_deviation * scales[n].mean));
      }
      store(row, fused(normed, w, b), count);
    }
  });
}

template <class T>
void norm(const PixelShuffleNorm& args, int64_t begin, int64_t end) {
  const ShuffledNorm& norm = args.norm;
  const int64_t token_size = norm.token_size();
  for (int64_t token = begin; token < end;) {
    const int64_t stop = token + kTogether < end ? token + kTogether : end;
    T* y = reinterpret_cast<T*>(args.y) + token * token_size;
    const int64_t count = (stop - token) * token_size / norm.size;
    for (T* to = y; token < stop; ++token, to += token_size) gather(norm, token, to);
    in_groups<kTogether>(0, count, norm.size, VLMFAST_LAMBDA(int64_t first, int64_t last, auto rows, int64_t size) {
      for (; first < last; first += rows) {
        Scale scales[rows];
        scales_of<T, rows>(y + first * size, size, norm.eps, scales);
        normalise<T, rows>(y + first * size, size, static_cast<const T*>(norm.weight), static_cast<const T*>(args.bias),
                           scales);
      }
    });
  }
}

// ---- backward ----

// Replaces one row by its gradient, by the formulas of the definition in vlmfast/ops, with sums in torch's order.
template <class T>
VLMFAST_INLINE void backward_row(const ShuffledNorm& norm, const T* grad_output, T* row, float* grad_weight,
                                 float* grad_bias) {
  const int64_t size = norm.size;
  const T* weight = static_cast<const T*>(norm.weight);
  const float elements = static_cast<float>(size), input_scale = norm.input_scale;
  float mean[1], variance[1], means[2];
  torch_sum<T>(size, mean, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&term)[1]) {
    term[0] = term[0] + load(row + offset, count);
  });
  const Block centre = broadcast(mean[0] / elements);
  const auto centred = VLMFAST_LAMBDA(int64_t offset, auto count) { return load(row + offset, count) - centre; };
  torch_sum<T>(size, variance, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&term)[1]) {
    term[0] = term[0] + centred(offset, count) * centred(offset, count);
  });
  const float inverse = 1.0f / __builtin_sqrtf(variance[0] / elements + norm.eps);
  const auto weighted = VLMFAST_LAMBDA(int64_t offset, auto count) {
    return load(grad_output + offset, count) * load(weight + offset, count);
  };
  torch_sum<T>(size, means, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&terms)[2]) {
    const Block grad = weighted(offset, count);
    terms[0] = terms[0] + grad;
    terms[1] = terms[1] + grad * (centred(offset, count) * inverse);
  });
  const Block mean_grad = broadcast(means[0] / elements);
  const float projection = means[1] / elements;
  each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block grad = load(grad_output + offset, count), normed = centred(offset, count) * inverse;
    store(grad_weight + offset, load(grad_weight + offset) + grad * normed);
    store(grad_bias + offset, load(grad_bias + offset) + grad);
    const Block grad_row = (weighted(offset, count) - mean_grad - normed * projection) * inverse;
    store(row + offset, grad_row * input_scale, count);
  });
}

template <class T>
void norm_backward(const PixelShuffleNormBackward& args, int64_t begin, int64_t end, char* buffer, float* grad_weight,
                   float* grad_bias) {
  const ShuffledNorm& norm = args.norm;
  const int64_t token_size = norm.token_size(), size = norm.size, run_bytes = norm.run_size * sizeof(T);
  T* const row = reinterpret_cast<T*>(buffer);
  int64_t rows = 0;
  for (int64_t token = begin; token < end; ++token) {
    const T* grad_output = reinterpret_cast<const T*>(args.grad_output[token]);
    gather(norm, token, row);
    for (int64_t offset = 0; offset < token_size; offset += size) {
      backward_row(norm, grad_output + offset, row + offset, grad_weight, grad_bias);
      ++rows;
      carry(grad_weight, size, rows);
      carry(grad_bias, size, rows);
    }
    char* const* runs = args.grad_x + token * norm.token_runs;
    for (int64_t run = 0; run < norm.token_runs; ++run) std::memcpy(runs[run], buffer + run * run_bytes, run_bytes);
  }
}

}  // namespace

template <>
PixelShuffleKernels kernels_at<PixelShuffleKernels, CpuLevel::VLMFAST_ISA>() {
  return {VLMFAST_BY_DTYPE(norm), VLMFAST_BY_DTYPE(norm_backward), VLMFAST_BY_DTYPE(sum_partials)};
}

}  // namespace vlmfast
