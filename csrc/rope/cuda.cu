// Rotary embedding of queries and keys on CUDA, with the norms of their heads, forward and backward.
// vlmfast/ops/rope/definition.py defines what is computed.
//
// Bound by memory. A block takes a row, so that its heads share the angles. A head stays in the registers of a few
// threads, each of which holds both elements of every pair that it rotates.
#include <optional>
#include <tuple>
#include <vector>

#include "common/partial_sums.cuh"
#include "rope/ops.h"

namespace vlmfast {
namespace {

using Sections = std::optional<std::vector<int64_t>>;

// How a head is distributed over adjacent threads. Each thread has kPairs pairs of vectors; a pair is one vector from
// the first half and one from the second half of either the rotated elements or the rest.
template <int kVec_, int kColumns_>
struct HeadPolicy {
  static constexpr int kVec = kVec_;
  static constexpr int kColumns = kColumns_;  // the longest head
  static constexpr bool kUnbounded = false;
  static constexpr int kVectors = kColumns / 2 / kVec;
  static constexpr int kThreadsPerHead = kVectors < kWarp ? kVectors : kWarp;
  static constexpr int kPairs = kVectors / kThreadsPerHead;
  static constexpr int kThreads = 128;
  static constexpr int kHeads = kThreads / kThreadsPerHead;  // heads of a block at a time
  static constexpr int kBlocksPerMultiprocessor = 4;         // for persistent grids

  __device__ __forceinline__ static int group() { return threadIdx.x / kThreadsPerHead; }

  // Calls function(k, first column, second column, frequency) for the pairs of a thread. The frequency is -1 for pairs
  // that are not rotated.
  template <typename Function>
  __device__ __forceinline__ static void for_pairs(int head_dim, int half, Function function) {
    const int rest_half = head_dim / 2 - half;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int pair = (threadIdx.x % kThreadsPerHead + k * kThreadsPerHead) * kVec;
      if (pair < half) {
        function(k, pair, half + pair, pair);
      } else if (pair < head_dim / 2) {
        function(k, half + pair, half + pair + rest_half, -1);
      }
    }
  }
};
template <int kVec>
using ShortHead = HeadPolicy<kVec, 128>;
template <int kVec>
using MiddleHead = HeadPolicy<kVec, 256>;
template <int kVec>
using LongHead = HeadPolicy<kVec, kMaxHeadDim>;

template <typename scalar_t>
struct Angles {
  Input<scalar_t, 2> cos, sin;
  int64_t rows;  // rows of one axis
  int half, ends[2];
};

// Queries or keys, the weight of their norm, and their output.
template <typename scalar_t>
struct Heads {
  Input<scalar_t, 3> x;      // (rows, heads, head_dim)
  Input<scalar_t, 3> other;  // only in the backward: the input of the norm
  const scalar_t* weight;    // (head_dim,), or null
  scalar_t* y;               // (rows, heads, head_dim)
  int heads;
};

// The vectors of a thread, from the first halves and from the second halves.
template <typename scalar_t, typename Policy>
struct Pairs {
  using Vec = Vector<scalar_t, Policy::kVec>;
  Vec first[Policy::kPairs] = {}, second[Policy::kPairs] = {};

  __device__ __forceinline__ void load(const scalar_t* row, int head_dim, int half) {
    Policy::for_pairs(head_dim, half, [&](int k, int left, int right, int) {
      first[k] = Vec::load(row + left);
      second[k] = Vec::load(row + right);
    });
  }
  // Loads a row of a table of angles, for the rotated pairs.
  __device__ __forceinline__ void load_angles(const Input<scalar_t, 2>& table, const Angles<scalar_t>& angles,
                                              int64_t row, int head_dim) {
    const scalar_t* const own = table.at(row % angles.rows);
    const int64_t axis_stride = angles.rows * table.strides[0];
    Policy::for_pairs(head_dim, angles.half, [&](int k, int, int, int frequency) {
      if (frequency < 0) return;
      if (angles.ends[0] == angles.half) {
        first[k] = Vec::load(own + frequency);
        second[k] = Vec::load(own + angles.half + frequency);
        return;
      }
#pragma unroll
      for (int i = 0; i < Policy::kVec; ++i) {
        const int place = frequency + i;
        const scalar_t* const of_axis = own + ((place >= angles.ends[0]) + (place >= angles.ends[1])) * axis_stride;
        first[k].values[i] = of_axis[place];
        second[k].values[i] = of_axis[angles.half + place];
      }
    });
  }
};

// Calls function(head) for the heads of the thread's group, equally often in every group of a block: `head` is -1 past
// the last one, so that all groups reach the shuffles and barriers of a sum.
template <typename Policy, typename Function>
__device__ __forceinline__ void for_heads(int heads, Function function) {
  for (int first = 0; first < heads; first += Policy::kHeads) {
    const int head = first + Policy::group();
    function(head < heads ? head : -1);
  }
}

// Blocks with blockIdx.y = 0 take the queries, those with 1 the keys.
//
// Limited (qk_norm_rope_kernel): each element is rounded up to four times, where Hugging Face rounds it; the angles of a
// token stay in registers for all of its heads, which leaves room for few blocks
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads)
    qk_norm_rope_kernel(Heads<scalar_t> query, Heads<scalar_t> key, Angles<scalar_t> angles, int64_t rows, int head_dim,
                        float eps, Variant variant) {
  constexpr int kVec = Policy::kVec;
  using Own = Pairs<scalar_t, Policy>;
  __shared__ GroupSum<Policy::kThreadsPerHead, 1> group_sum;
  const Heads<scalar_t> part = blockIdx.y == 0 ? query : key;  // a reference would put both into local memory
  const int half = angles.half;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    Own cos, sin, weight;
    if (Policy::group() < part.heads) {
      cos.load_angles(angles.cos, angles, row, head_dim);
      sin.load_angles(angles.sin, angles, row, head_dim);
      if (part.weight != nullptr) weight.load(part.weight, head_dim, half);
    }
    for_heads<Policy>(part.heads, [&](int head) {
      Own x;
      if (head >= 0) x.load(part.x.at(row, head), head_dim, half);
      float inverse_rms = 1.f;
      if (part.weight != nullptr) {
        float sums[1] = {0.f};
#pragma unroll
        for (int k = 0; k < Policy::kPairs; ++k) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float a = x.first[k][i], b = x.second[k][i];
            sums[0] += a * a + b * b;
          }
        }
        group_sum.add_up(sums, turn++);
        inverse_rms = rsqrtf(sums[0] / head_dim + eps);
      }
      if (head < 0) return;
      // Writes the normalised elements of a vector.
      const auto norm = [&](const typename Own::Vec& values, const typename Own::Vec& weights, float (&normed)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) normed[i] = values[i];
        if (part.weight == nullptr) return;
#pragma unroll
        for (int i = 0; i < kVec; ++i) normed[i] *= inverse_rms;
        round_normed<scalar_t>(variant, normed);
#pragma unroll
        for (int i = 0; i < kVec; ++i) normed[i] *= weight_scale(variant, weights[i]);
        round_all<scalar_t>(normed);
      };
      // Multiplies the elements of a vector by those of another, and rounds the products.
      const auto product = [&](const float (&values)[kVec], const typename Own::Vec& factors, float (&products)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) products[i] = values[i] * factors[i];
        round_all<scalar_t>(products);
      };
      scalar_t* const to = part.y + (row * part.heads + head) * head_dim;
      Policy::for_pairs(head_dim, half, [&](int k, int left, int right, int frequency) {
        float a[kVec], b[kVec], with_cos[kVec], with_sin[kVec];
        norm(x.first[k], weight.first[k], a);
        norm(x.second[k], weight.second[k], b);
        typename Own::Vec first, second;
        product(a, cos.first[k], with_cos);
        product(b, sin.first[k], with_sin);
        first.fill([&](int i) { return frequency < 0 ? a[i] : with_cos[i] - with_sin[i]; });
        product(b, cos.second[k], with_cos);
        product(a, sin.second[k], with_sin);
        second.fill([&](int i) { return frequency < 0 ? b[i] : with_cos[i] + with_sin[i]; });
        first.store(to + left);
        second.store(to + right);
      });
    });
  }
}

// Stores the sums of a block, added over the groups of threads that take its heads.
template <typename Policy>
__device__ __forceinline__ void store_sums(const float (&first)[Policy::kPairs][Policy::kVec],
                                           const float (&second)[Policy::kPairs][Policy::kVec],
                                           float* __restrict__ partial, int head_dim, int half) {
  VLMFAST_DYNAMIC_SHARED(float, group_sums);  // (kHeads, head_dim)
  float* const own_sums = group_sums + Policy::group() * head_dim;
  Policy::for_pairs(head_dim, half, [&](int k, int left, int right, int) {
#pragma unroll
    for (int i = 0; i < Policy::kVec; ++i) {
      own_sums[left + i] = first[k][i];
      own_sums[right + i] = second[k][i];
    }
  });
  __syncthreads();
  for (int column = threadIdx.x; column < head_dim; column += Policy::kThreads) {
    float sum = 0.f;
    for (int group = 0; group < Policy::kHeads; ++group) sum += group_sums[group * head_dim + column];
    partial[column] = sum;
  }
}

// A persistent grid: each block writes its part of the weight gradients to one row of `partials`.
//
// Limited (qk_norm_rope_backward_kernel): each element takes part in two sums, a rotation and the weight's gradient, of
// which all operands stay in registers
template <typename scalar_t, typename Policy>
__global__ void __launch_bounds__(Policy::kThreads)
    qk_norm_rope_backward_kernel(Heads<scalar_t> query, Heads<scalar_t> key, Angles<scalar_t> angles,
                                 float* __restrict__ partials,  // (gridDim.x, 2, head_dim), or null
                                 int64_t rows, int head_dim, float eps, Variant variant) {
  constexpr int kVec = Policy::kVec, kPairs = Policy::kPairs;
  using Own = Pairs<scalar_t, Policy>;
  __shared__ GroupSum<Policy::kThreadsPerHead, 2> group_sum;
  const Heads<scalar_t> part = blockIdx.y == 0 ? query : key;  // a reference would put both into local memory
  const int half = angles.half;
  float weight_first[kPairs][kVec] = {}, weight_second[kPairs][kVec] = {};
  Own weight;
  if (part.weight != nullptr) weight.load(part.weight, head_dim, half);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    Own cos, sin;
    if (Policy::group() < part.heads) {
      cos.load_angles(angles.cos, angles, row, head_dim);
      sin.load_angles(angles.sin, angles, row, head_dim);
    }
    for_heads<Policy>(part.heads, [&](int head) {
      Own grad, x;
      if (head >= 0) grad.load(part.x.at(row, head), head_dim, half);
      if (head >= 0 && part.weight != nullptr) x.load(part.other.at(row, head), head_dim, half);
      float first[kPairs][kVec] = {}, second[kPairs][kVec] = {};  // the gradients of the normalised head
      Policy::for_pairs(head_dim, half, [&](int k, int, int, int frequency) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float a = grad.first[k][i], b = grad.second[k][i];
          first[k][i] = frequency < 0 ? a : a * cos.first[k][i] + b * sin.second[k][i];
          second[k][i] = frequency < 0 ? b : b * cos.second[k][i] - a * sin.first[k][i];
        }
      });
      float inverse_rms = 1.f, projection = 0.f;
      if (part.weight != nullptr) {
        float sums[2] = {0.f, 0.f};  // of x * x, and of gradient * weight * x
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float a = x.first[k][i], b = x.second[k][i];
            sums[0] += a * a + b * b;
            sums[1] += first[k][i] * weight_scale(variant, weight.first[k][i]) * a +
                       second[k][i] * weight_scale(variant, weight.second[k][i]) * b;
          }
        }
        group_sum.add_up(sums, turn++);
        inverse_rms = rsqrtf(sums[0] / head_dim + eps);
        projection = sums[1] * inverse_rms / head_dim;
      }
      if (head < 0) return;
      // Stores the gradients of a vector of the head from those of the normalised one, and accumulates the weight's.
      const auto finish = [&](float (&own)[kVec], const typename Own::Vec& values, const typename Own::Vec& weights,
                              float (&weight_sums)[kVec], scalar_t* to) {
        if (part.weight == nullptr) return Own::Vec::rounded(own).store(to);
        float normed[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) normed[i] = values[i] * inverse_rms;
        typename Own::Vec output;
        output.fill(
            [&](int i) { return inverse_rms * (own[i] * weight_scale(variant, weights[i]) - normed[i] * projection); });
        output.store(to);
        round_normed<scalar_t>(variant, normed);
#pragma unroll
        for (int i = 0; i < kVec; ++i) weight_sums[i] += own[i] * normed[i];
      };
      scalar_t* const to = part.y + (row * part.heads + head) * head_dim;
      Policy::for_pairs(head_dim, half, [&](int k, int left, int right, int) {
        finish(first[k], x.first[k], weight.first[k], weight_first[k], to + left);
        finish(second[k], x.second[k], weight.second[k], weight_second[k], to + right);
      });
    });
  }
  if (partials != nullptr) {
    store_sums<Policy>(weight_first, weight_second, partials + (int64_t{blockIdx.x} * 2 + blockIdx.y) * head_dim,
                       head_dim, half);
  }
}

template <typename scalar_t>
Angles<scalar_t> kernel_angles(const DeviceScope& scope, const AngleArguments& angles) {
  return {scope.input<scalar_t>(angles.cos),
          scope.input<scalar_t>(angles.sin),
          angles.rows,
          static_cast<int>(angles.half()),
          {static_cast<int>(angles.ends[0]), static_cast<int>(angles.ends[1])}};
}

template <typename scalar_t>
Heads<scalar_t> kernel_heads(const DeviceScope& scope, const HeadArguments& heads, const View<3>& other,
                             const Tensor& output) {
  return {scope.input<scalar_t>(heads.x), scope.input<scalar_t>(other), scope.input<scalar_t>(heads.weight).data,
          scope.output<scalar_t>(output), static_cast<int>(heads.heads)};
}

// Calls function(scalar_t(), policy) for the dtype and the length of heads.
template <typename Function, typename... Views>
void with_heads(const RopeArguments& call, const Function& function, const Views&... others) {
  STD_TORCH_CHECK(call.angles.dtype == call.dtype, "cos must be ", info(call.dtype).name, ", got ",
                  info(call.angles.dtype).name);
  const int64_t vec = kVectorBytes / info(call.dtype).width, half = call.angles.half();
  const bool fit = half % vec == 0 && (call.head_dim / 2 - half) % vec == 0 &&
                   vectors_fit(kVectorBytes, call.query.x, call.key.x, call.query.weight, call.key.weight,
                               call.angles.cos, call.angles.sin, others...);
  with_row_policy<ShortHead, MiddleHead, LongHead>(call.dtype, call.head_dim, fit, function);
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& query, const Tensor& key,
                                        const std::optional<Tensor>& query_weight,
                                        const std::optional<Tensor>& key_weight, const Tensor& cos, const Tensor& sin,
                                        double eps, Variant variant, Sections sections) {
  const RopeArguments call("query", query, "key", key, query_weight, key_weight, cos, sin, sections);
  Tensor query_output = allocate_like(query), key_output = allocate_like(key);
  if (call.rows == 0) return {query_output, key_output};
  const DeviceScope scope(query);
  with_heads(call, [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    check_cuda(launch(qk_norm_rope_kernel<scalar_t, Policy>, dim3(std::min<int64_t>(call.rows, kMaxBlocks), 2),
                      dim3(Policy::kThreads), 0, scope.stream(),
                      kernel_heads<scalar_t>(scope, call.query, {}, query_output),
                      kernel_heads<scalar_t>(scope, call.key, {}, key_output),
                      kernel_angles<scalar_t>(scope, call.angles), call.rows, call.head_dim, eps, variant));
  });
  return {query_output, key_output};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_query, const Tensor& grad_key,
                                                                 const std::optional<Tensor>& query,
                                                                 const std::optional<Tensor>& key,
                                                                 const std::optional<Tensor>& query_weight,
                                                                 const std::optional<Tensor>& key_weight,
                                                                 const Tensor& cos, const Tensor& sin, double eps,
                                                                 Variant variant, Sections sections, bool weight_grad) {
  const RopeBackwardArguments call(grad_query, grad_key, query, key, query_weight, key_weight, cos, sin, sections);
  weight_grad = weight_grad && call.has_norm();
  const int64_t weight_size = weight_grad ? int64_t{call.head_dim} : 0;
  Tensor query_output = allocate_like(grad_query), key_output = allocate_like(grad_key);
  Tensor query_sum = allocate({weight_size}, grad_query, call.dtype);
  Tensor key_sum = allocate({weight_size}, grad_query, call.dtype);
  if (call.rows == 0 && !weight_grad) return {query_output, key_output, query_sum, key_sum};
  const DeviceScope scope(grad_query);
  const auto run = [&](auto zero, auto policy) {
    using scalar_t = decltype(zero);
    using Policy = decltype(policy);
    const int64_t blocks =
        std::min<int64_t>(call.rows, int64_t{scope.multiprocessors()} * Policy::kBlocksPerMultiprocessor);
    std::optional<Tensor> partials;
    if (weight_grad) partials = float_buffer(blocks * 2 * call.head_dim, grad_query);
    float* const partials_data = weight_grad ? scope.output<float>(*partials) : nullptr;
    const size_t shared_bytes = weight_grad ? Policy::kHeads * call.head_dim * sizeof(float) : 0;
    if (blocks > 0) {
      check_cuda(
          launch(qk_norm_rope_backward_kernel<scalar_t, Policy>, dim3(blocks, 2), dim3(Policy::kThreads), shared_bytes,
                 scope.stream(), kernel_heads<scalar_t>(scope, call.query, call.query_x, query_output),
                 kernel_heads<scalar_t>(scope, call.key, call.key_x, key_output),
                 kernel_angles<scalar_t>(scope, call.angles), partials_data, call.rows, call.head_dim, eps, variant));
    }
    if (weight_grad) {
      launch_sum_partials(scope, partials_data, blocks, call.head_dim, scope.output<scalar_t>(query_sum),
                          scope.output<scalar_t>(key_sum));
    }
  };
  with_heads(call, run, call.query_x, call.key_x);
  return {query_output, key_output, query_sum, key_sum};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
