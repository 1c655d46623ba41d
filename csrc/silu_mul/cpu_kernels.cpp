// The arithmetic of the gated activation on the CPU, compiled once per instruction set (see types.h). All give the same
// bits.
//
// The activated gate is rounded where Hugging Face rounds it. SiLU is bit-identical to torch's: in float32 and float16
// its exponential is that of torch's vectorised code, and in bfloat16 see `quick_silu`. The exception is the end of a
// float32 tensor that does not fill a vector, for which torch calls another exponential.
#include "silu_mul/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

constexpr float kBeta = 0.7978845608028654f;  // sqrt(2 / pi), as torch rounds it
constexpr float kKappa = 0.044715f;

// e^x to 1 ulp: infinity from 88.73 on, and clamped to at least e^-87. NaNs stay NaNs.
VLMFAST_INLINE Float exponential(Float x) {
  constexpr float kLeast = -87, kMost = 89;
  x = smaller(Float{} + kMost, larger(Float{} + kLeast, x));
  const Float shifted = x * kLog2E + kShift, whole = shifted - kShift;
  Float rest = fused(whole, Float{} - 0.693145751953125f, x);  // ln(2) is subtracted in two parts
  rest = fused(whole, Float{} - 1.428606765330187e-06f, rest);
  Float value = fused(Float{} + 0.00019852762f, rest, Float{} + 0.0013930436f);
  value = fused(value, rest, Float{} + 0.008333361f);
  value = fused(value, rest, Float{} + 0.041666485f);
  value = fused(value, rest, Float{} + 0.16666667f);
  value = fused(value, rest, Float{} + 0.5f);
  value = 1.0f + fused(rest * rest, value, rest);
  const Float half = value * (Float)(((Bits)shifted << 23) + 0x3f000000u);  // 2^(n - 1), because 2^128 is no float32
  return half + half;
}

// x / (1 + e^-x), bit-identical to torch's SiLU for every bfloat16 once it is rounded to bfloat16. The coefficients are
// the solution of a linear program: for each of these numbers, the quotient has to lie between the two ties around
// torch's result, and stays further from both than float32 arithmetic errs. In steps of whole blocks, the latency of one
// register hides behind the others.
VLMFAST_INLINE Block quick_silu(const Block& x) {
  constexpr float kLeast = -126, kMost = 128;
  const Block power = each_part(
      VLMFAST_LAMBDA(int i) { return smaller(Float{} + kMost, larger(Float{} + kLeast, x.part[i] * -kLog2E)); });
  const Block shifted = kShift + power, rest = power - (-kShift + shifted);
  Block value = each_part(VLMFAST_LAMBDA(int) { return Float{} + 0x1.27d3b0p-7f; });
  VLMFAST_UNROLL
  for (const float coefficient : {0x1.ca0568p-5f, 0x1.ec4098p-3f, 0x1.62de6ap-1f, 1.0f}) {
    value = each_part(VLMFAST_LAMBDA(int i) { return fused(value.part[i], rest.part[i], Float{} + coefficient); });
  }
  return each_part(VLMFAST_LAMBDA(int i) {
    // The integer is added to the exponent. 2^128 is infinity, because `rest` is zero there and the value exactly 1.
    return x.part[i] / (1.0f + (Float)((Bits)value.part[i] + ((Bits)shifted.part[i] << 23)));
  });
}

VLMFAST_INLINE Float gelu_inner(Float x) { return kBeta * (x + kKappa * (x * x * x)); }

VLMFAST_INLINE Float gelu_tanh(Float x) {
  constexpr float kOne = 8.664339742f;  // from here on torch's tanh is 1
  const Float inner = gelu_inner(x), size = inner < 0.0f ? -inner : inner;
  const Float tanh = size > kOne ? Float{} + 1.0f : 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  return 0.5f * x * (1.0f + (inner < 0.0f ? -tanh : tanh));
}

template <class T, Activation activation>
VLMFAST_INLINE Block activate(const Block& x) {
  if constexpr (activation == Activation::kGeluTanh) {
    return each_part(VLMFAST_LAMBDA(int i) { return gelu_tanh(x.part[i]); });
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return quick_silu(x);
  } else {
    return each_part(VLMFAST_LAMBDA(int i) { return x.part[i] / (1.0f + exponential(-x.part[i])); });
  }
}

template <class T, Activation activation>
void forward(const SiluMulForward& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.hidden;  // copied, because the compiler must assume that stores alias `args`
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_row_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_row_stride;
    T* y = static_cast<T*>(args.y) + row * hidden;
    each_block(hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
      const Block activated = activate<T, activation>(load(gate + offset, count));
      store(y + offset, round_to<T>(activated) * load(up + offset, count), count);
    });
  }
}

// The formula of the definition in vlmfast/ops.
template <class T, Activation activation>
void backward(const SiluMulBackward& args, int64_t begin, int64_t end) {
  const int64_t hidden = args.hidden;
  for (int64_t row = begin; row < end; ++row) {
    const T* grad_output = static_cast<const T*>(args.grad_output) + row * args.grad_output_row_stride;
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_row_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_row_stride;
    T* grad_gate = static_cast<T*>(args.grad_gate) + row * hidden;
    T* grad_up = static_cast<T*>(args.grad_up) + row * hidden;
    each_block(hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
      const Block x = load(gate + offset, count), grad = load(grad_output + offset, count);
      Block share, slope;
      VLMFAST_UNROLL
      for (int i = 0; i < kParts; ++i) {
        const Float value = x.part[i];
        Float z = value, z_slope = Float{} + 1.0f;
        if constexpr (activation == Activation::kGeluTanh) {
          z = 2.0f * gelu_inner(value);
          z_slope = 2.0f * kBeta * (1.0f + 3.0f * kKappa * value * value);
        }
        const Float power = exponential(-z), part = 1.0f / (1.0f + power);
        const Float rest = part == 0.0f ? Float{} + 1.0f : power * part;  // 1 - part, without cancellation
        share.part[i] = part;
        slope.part[i] = part * (1.0f + value * z_slope * rest);
      }
      store(grad_gate + offset, grad * load(up + offset, count) * slope, count);
      store(grad_up + offset, grad * x * share, count);
    });
  }
}

}  // namespace

template <>
SiluMulKernels kernels_at<SiluMulKernels, CpuLevel::VLMFAST_ISA>() {
  return {{VLMFAST_BY_DTYPE(forward, Activation::kSilu), VLMFAST_BY_DTYPE(forward, Activation::kGeluTanh)},
          {VLMFAST_BY_DTYPE(backward, Activation::kSilu), VLMFAST_BY_DTYPE(backward, Activation::kGeluTanh)}};
}

}  // namespace vlmfast
