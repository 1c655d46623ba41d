// The gated activation on CUDA, forward and backward. vlmfast/ops/silu_mul/definition.py defines what is computed.
//
// Bound by memory: each element is read and written once, and there are no barriers.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "silu_mul/ops.h"

namespace vlmfast {
namespace {

constexpr float kBeta = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kKappa = 0.044715f;
constexpr int kThreads = 256;

// A block takes several short rows, or a part of a long one, so that the single row of a decoded token is spread over
// many blocks.
struct Tiles {
  unsigned per_row, blocks;  // blocks along a row, and all of them
  dim3 shape;                // threads along each row, and rows of a block

  Tiles(int64_t count, int64_t vectors) {
    constexpr int64_t kSegment = 8;  // threads that cover one 128-byte line
    const int64_t along = std::clamp<int64_t>((vectors + kSegment - 1) / kSegment * kSegment, kSegment, kThreads);
    const int64_t rows = kThreads / along;
    per_row = (vectors + along - 1) / along;
    const int64_t all = (count + rows - 1) / rows * per_row;
    STD_TORCH_CHECK(all <= kMostInt, "gate must have fewer parts than 2^31");  // counted in 32 bits
    blocks = all;
    shape = dim3(along, rows);
  }

  // Calls function(row, column) for the vectors of a thread, in a loop over the grid.
  template <int kVec, typename Function>
  __device__ __forceinline__ void for_vectors(int64_t rows, int hidden, Function function) const {
    for (unsigned block = blockIdx.x; block < blocks; block += gridDim.x) {
      const int64_t row = int64_t{block / per_row} * blockDim.y + threadIdx.y;
      const int column = static_cast<int>((block % per_row * blockDim.x + threadIdx.x) * kVec);
      if (row < rows && column < hidden) function(row, column);
    }
  }
};

__device__ __forceinline__ float gelu_inner(float x) { return kBeta * (x + kKappa * (x * x * x)); }

__device__ __forceinline__ float activate(Activation activation, float x) {
  return activation == Activation::kSilu ? x / (1.f + expf(-x)) : 0.5f * x * (1.f + tanhf(gelu_inner(x)));
}

// Limited (silu_mul_kernel): GELU takes a tanh, because far below zero its rounding decides the last bits of the result;
// tanhf has two branches for each element, and so many registers that four blocks remain
template <typename scalar_t, int kVec, Activation kActivated>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(Input<scalar_t, 2> gate,   // (rows, hidden)
                                                            Input<scalar_t, 2> up,     // (rows, hidden)
                                                            scalar_t* __restrict__ y,  // (rows, hidden)
                                                            int64_t rows, int hidden, Tiles tiles) {
  using Vec = Vector<scalar_t, kVec>;
  tiles.for_vectors<kVec>(rows, hidden, [&](int64_t row, int column) {
    const Vec gates = Vec::load(gate.at(row) + column), ups = Vec::load(up.at(row) + column);
    float activated[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) activated[i] = activate(kActivated, gates[i]);
    round_all<scalar_t>(activated);
    Vec output;
    output.fill([&](int i) { return activated[i] * ups[i]; });
    output.store(y + row * hidden + column);
  });
}

// Limited (silu_mul_backward_kernel): GELU has a polynomial in the exponential and its slope for each element
template <typename scalar_t, int kVec, Activation kActivated>
__global__ void __launch_bounds__(kThreads)
    silu_mul_backward_kernel(Input<scalar_t, 2> grad_output,    // (rows, hidden)
                             Input<scalar_t, 2> gate,           // (rows, hidden)
                             Input<scalar_t, 2> up,             // (rows, hidden)
                             scalar_t* __restrict__ grad_gate,  // (rows, hidden)
                             scalar_t* __restrict__ grad_up,    // (rows, hidden)
                             int64_t rows, int hidden, Tiles tiles) {
  using Vec = Vector<scalar_t, kVec>;
  tiles.for_vectors<kVec>(rows, hidden, [&](int64_t row, int column) {
    const Vec grads = Vec::load(grad_output.at(row) + column);
    const Vec gates = Vec::load(gate.at(row) + column), ups = Vec::load(up.at(row) + column);
    float of_gate[kVec], of_up[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x = gates[i];
      float z = x, z_slope = 1.f;
      if constexpr (kActivated == Activation::kGeluTanh) {
        z = 2.f * gelu_inner(x);
        z_slope = 2.f * kBeta * (1.f + 3.f * kKappa * x * x);
      }
      const float power = expf(-z), share = 1.f / (1.f + power);
      const float rest = share == 0.f ? 1.f : power * share;  // 1 - share, without cancellation
      of_gate[i] = grads[i] * ups[i] * share * (1.f + x * z_slope * rest);
      of_up[i] = grads[i] * x * share;
    }
    Vec::rounded(of_gate).store(grad_gate + row * hidden + column);
    Vec::rounded(of_up).store(grad_up + row * hidden + column);
  });
}

// Calls function(scalar_t(), vector width, activation), the last two as integral constants. Does nothing for empty
// tensors.
template <typename Function>
void with_types(const SiluMulArguments& args, Activation activation, Function function) {
  if (args.gate.numel() == 0) return;
  const auto choose = [&](auto zero) {
    const auto in_vectors = [&](auto width) {
      if (activation == Activation::kSilu) {
        function(zero, width, std::integral_constant<Activation, Activation::kSilu>());
      } else {
        function(zero, width, std::integral_constant<Activation, Activation::kGeluTanh>());
      }
    };
    if (vectors_fit(kVectorBytes, args.gate, args.up, args.grad_output)) {
      in_vectors(std::integral_constant<int, kVectorBytes / sizeof(zero)>());
    } else {
      in_vectors(std::integral_constant<int, 1>());
    }
  };
  with_dtype(args.dtype, choose);
}

Tensor silu_mul(const Tensor& gate, const Tensor& up, Activation activation) {
  const SiluMulArguments args(gate, up);
  Tensor y = allocate_like(gate);
  const DeviceScope scope(gate);
  with_types(args, activation, [&](auto zero, auto width, auto activated) {
    using scalar_t = decltype(zero);
    constexpr int kVec = decltype(width)::value;
    const Tiles tiles(args.rows, args.hidden / kVec);
    launch_blocks(scope, silu_mul_kernel<scalar_t, kVec, decltype(activated)::value>, tiles.blocks, tiles.shape, 0,
                  scope.input<scalar_t>(args.gate), scope.input<scalar_t>(args.up), scope.output<scalar_t>(y),
                  int64_t{args.rows}, args.hidden, tiles);
  });
  return y;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad_output, const Tensor& gate, const Tensor& up,
                                             Activation activation) {
  const SiluMulArguments args(gate, up, grad_output);
  Tensor grad_gate = allocate_like(gate), grad_up = allocate_like(gate);
  const DeviceScope scope(gate);
  with_types(args, activation, [&](auto zero, auto width, auto activated) {
    using scalar_t = decltype(zero);
    constexpr int kVec = decltype(width)::value;
    const Tiles tiles(args.rows, args.hidden / kVec);
    launch_blocks(scope, silu_mul_backward_kernel<scalar_t, kVec, decltype(activated)::value>, tiles.blocks,
                  tiles.shape, 0, scope.input<scalar_t>(args.grad_output), scope.input<scalar_t>(args.gate),
                  scope.input<scalar_t>(args.up), scope.output<scalar_t>(grad_gate), scope.output<scalar_t>(grad_up),
                  int64_t{args.rows}, args.hidden, tiles);
  });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
