// The arithmetic of rotary embedding on the CPU, compiled once per instruction set (see types.h). All give the same
// bits.
//
// The forward is bit-identical to Hugging Face's code: it rounds where that code rounds and sums in torch's order.
#include "rope/cpu_kernels.h"

#include "common/partial_sums.h"
#include "common/rms.h"

namespace vlmfast {
namespace {

constexpr int kMaxHalf = kMaxHeadDim / 2 + kBlock;  // with room for the overlapping last block

// Calls function(place, offset, count) on the blocks of `size` elements. The last block ends with the last element and
// so may overlap the one before it: computing an element twice gives the same bits and costs less than a partial block.
// `offset` is the first element of a block, `place` its position when the blocks are stored without overlap. With
// `whole`, `size` must be a multiple of kBlock.
template <bool whole, class F>
VLMFAST_INLINE void each_block_of(int64_t size, const F& function) {
  if (!whole && size < kBlock) {
    if (size > 0) function(int64_t{0}, int64_t{0}, static_cast<int>(size));
    return;
  }
  for (int64_t place = 0; place < size; place += kBlock) {
    function(place, whole || place + kBlock <= size ? place : size - kBlock, Whole{});
  }
}

// Widens a block of elements and stores it in the order in which blocks of T are loaded.
template <class T, class From, class Count>
VLMFAST_INLINE void widen_as(const From* from, float* to, Count count) {
  if constexpr (std::is_same_v<T, From> || !std::is_same_v<T, BFloat16>) {
    store(to, load(from, count));
  } else {
    float ordered[kBlock];
    store(ordered, load(from, count));
    for (int i = 0; i < kBlock; ++i) to[place<T>(i)] = ordered[i];
  }
}

// The weight of a head, widened once for all heads: the first and second half of the rotated elements, then the rest.
struct Widened {
  alignas(64) float half[2][kMaxHalf];
  alignas(64) float rest[kMaxHeadDim + kBlock];
};

template <class T, class From>
VLMFAST_INLINE void widen_halves(const From* from, int64_t half, float (&to)[2][kMaxHalf]) {
  each_block_of<false>(half, VLMFAST_LAMBDA(int64_t place, int64_t offset, auto count) {
    widen_as<T>(from + offset, to[0] + place, count);
    widen_as<T>(from + half + offset, to[1] + place, count);
  });
}

template <class T>
void widen_weight(const T* from, int64_t half, int64_t head_dim, float weight_offset, Widened& to) {
  widen_halves<T>(from, half, to.half);
  each_block_of<false>(head_dim - 2 * half, VLMFAST_LAMBDA(int64_t place, int64_t offset, auto count) {
    widen_as<T>(from + 2 * half + offset, to.rest + place, count);
  });
  for (auto& part : to.half) {
    for (float& value : part) value = weight_offset + value;
  }
  for (float& value : to.rest) value = weight_offset + value;
}

// The cosines and sines of a row.
struct RowAngles {
  alignas(64) float cos[2][kMaxHalf], sin[2][kMaxHalf];
};

// Returns a row of angles. With sections, each section of the frequencies is copied from its axis, in both halves.
template <class Angle>
VLMFAST_INLINE const Angle* combine(const RopeAngles& angles, const void* data, int64_t stride, int64_t row,
                                    Angle* joined) {
  const Angle* from = static_cast<const Angle*>(data) + row * stride;
  const int64_t half = angles.rotary_dim / 2;
  if (angles.ends[0] == half) return from;
  const int64_t begins[] = {0, angles.ends[0], angles.ends[1], half};
  for (int axis = 0; axis < 3; ++axis) {
    const Angle* own = from + axis * angles.rows * stride;
    for (int64_t i = begins[axis]; i < begins[axis + 1]; ++i) {
      joined[i] = own[i];
      joined[half + i] = own[half + i];
    }
  }
  return joined;
}

template <class T, class Angle>
void load_angles(const RopeAngles& angles, int64_t row, RowAngles& to) {
  Angle joined[kMaxHeadDim];
  const int64_t half = angles.rotary_dim / 2, own = row % angles.rows;
  widen_halves<T>(combine(angles, angles.cos, angles.cos_row_stride, own, joined), half, to.cos);
  widen_halves<T>(combine(angles, angles.sin, angles.sin_row_stride, own, joined), half, to.sin);
}

// ---- forward ----

// Normalises and rotates one head. `whole`: each rotated half, and the rest, is a multiple of kBlock elements.
template <class T, HeadNorm norm, bool rounded, bool whole>
VLMFAST_INLINE void turn_head(const T* x, T* y, int64_t size, int64_t half, const Widened& weight,
                              const RowAngles& angles, float inverse_rms) {
  const auto normed = VLMFAST_LAMBDA(int64_t offset, const float* w, auto count)->Block {
    const Block value = load(x + offset, count);
    if constexpr (norm == HeadNorm::kNone) return value;
    return round_to<T>(round_if<T>(norm == HeadNorm::kTwice, value * inverse_rms) * load(w));
  };
  each_block_of<whole>(half, VLMFAST_LAMBDA(int64_t place, int64_t offset, auto count) {
    const Block first = normed(offset, weight.half[0] + place, count);
    const Block second = normed(half + offset, weight.half[1] + place, count);
    const Block left = round_if<T>(rounded, first * load(angles.cos[0] + place)) -
                       round_if<T>(rounded, second * load(angles.sin[0] + place));
    store(y + offset, left, count);
    const Block right = round_if<T>(rounded, second * load(angles.cos[1] + place)) +
                        round_if<T>(rounded, first * load(angles.sin[1] + place));
    store(y + half + offset, right, count);
  });
  each_block_of<whole>(size - 2 * half, VLMFAST_LAMBDA(int64_t place, int64_t offset, auto count) {
    store(y + 2 * half + offset, normed(2 * half + offset, weight.rest + place, count), count);
  });
}

// Normalises and rotates N heads, which lie `stride` elements apart. Their sums are accumulated together, because the
// latency of one sum is as long as the rest of the work on a head.
template <class T, HeadNorm norm, bool rounded, bool whole, int N, class Size>
VLMFAST_INLINE void turn_heads(const T* x, int64_t stride, T* y, Size size, int64_t half, const Widened& weight,
                               const RowAngles& angles, float eps) {
  float inverse_rms[N] = {};
  if constexpr (norm != HeadNorm::kNone) {
    float sums[N];
    torch_sum<T>(size, sums, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&total)[N]) {
      VLMFAST_UNROLL
      for (int n = 0; n < N; ++n) {
        const Block value = load(x + n * stride + offset, count);
        total[n] = total[n] + value * value;
      }
    });
    inverse_roots(sums, size, eps, inverse_rms);
  }
#pragma GCC unroll 1
  for (int n = 0; n < N; ++n) {
    turn_head<T, norm, rounded, whole>(x + n * stride, y + n * size, size, half, weight, angles, inverse_rms[n]);
  }
}

// Whether short heads are processed several at a time. Excluded are combinations that no model uses, to limit the
// number of kernels, and float16 if it is converted in software.
template <class T, HeadNorm norm, bool rounded>
constexpr bool kGrouped = norm != HeadNorm::kNone && (rounded || std::is_same_v<T, float>) &&
                          (kHalfInstructions || !std::is_same_v<T, Float16>);

template <class T, HeadNorm norm, bool rounded>
VLMFAST_INLINE void turn_row(const RopeHeads& heads, int64_t row, int64_t head_dim, int64_t half, const Widened& weight,
                             const RowAngles& angles, float eps) {
  const T* x = static_cast<const T*>(heads.x) + row * heads.row_stride;
  T* y = static_cast<T*>(heads.y) + row * heads.heads * head_dim;
  int64_t head = 0;
  if constexpr (kGrouped<T, norm, rounded>) {
    constexpr int kGroup = 4;
    const auto groups = VLMFAST_LAMBDA(auto size) {
      for (; head + kGroup <= heads.heads; head += kGroup) {
        turn_heads<T, norm, rounded, true, kGroup>(x + head * heads.head_stride, heads.head_stride, y + head * size,
                                                   size, half, weight, angles, eps);
      }
    };
    if (half % kBlock == 0 && head_dim == 128) groups(std::integral_constant<int64_t, 128>{});
    if (half % kBlock == 0 && head_dim == 64) groups(std::integral_constant<int64_t, 64>{});
  }
  for (; head < heads.heads; ++head) {
    turn_heads<T, norm, rounded, false, 1>(x + head * heads.head_stride, 0, y + head * head_dim, head_dim, half, weight,
                                           angles, eps);
  }
}

template <class T, HeadNorm norm, bool rounded>
void forward(const RopeForward& args, int64_t begin, int64_t end) {
  using Angle = std::conditional_t<rounded, T, float>;
  const int64_t half = args.angles.rotary_dim / 2, head_dim = args.head_dim;
  Widened weights[2];
  if constexpr (norm != HeadNorm::kNone) {
    for (int part = 0; part < 2; ++part) {
      widen_weight(static_cast<const T*>(args.parts[part].weight), half, head_dim, args.weight_offset, weights[part]);
    }
  }
  RowAngles angles;
  for (int64_t row = begin; row < end; ++row) {
    load_angles<T, Angle>(args.angles, row, angles);
    for (int part = 0; part < 2; ++part) {
      turn_row<T, norm, rounded>(args.parts[part], row, head_dim, half, weights[part], angles, args.eps);
    }
  }
}

// ---- backward: nothing is rounded in between, so blocks can be in memory order ----

// Rotates the gradient of a head back, into float32.
template <class T>
VLMFAST_INLINE void turn_back(const T* grad, int64_t size, int64_t half, const RowAngles& angles, float* to) {
  each_block_of<false>(half, VLMFAST_LAMBDA(int64_t place, int64_t offset, auto count) {
    const Block first = load(grad + offset, count), second = load(grad + half + offset, count);
    store(to + offset, first * load(angles.cos[0] + place) + second * load(angles.sin[1] + place), count);
    store(to + half + offset, second * load(angles.cos[1] + place) - first * load(angles.sin[0] + place), count);
  });
  each_block_of<false>(size - 2 * half, VLMFAST_LAMBDA(int64_t, int64_t offset, auto count) {
    store(to + 2 * half + offset, load(grad + 2 * half + offset, count), count);
  });
}

// Computes the gradient of a head from that of its normalised output, and adds the head's share of the weight gradient
// to `partial` unless it is null.
template <class T>
VLMFAST_INLINE void norm_back(const float* grad, const T* x, const float* weight, int64_t size, float eps, bool rounded,
                              T* grad_x, float* partial) {
  float sums[2], inverse_rms[1];
  torch_sum<T>(size, sums, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&total)[2]) {
    const Block value = load(x + offset, count);
    total[0] = total[0] + value * value;
    total[1] = total[1] + load(grad + offset, count) * load(weight + offset, count) * value;
  });
  inverse_roots(sums, size, eps, inverse_rms);
  const float projection = sums[1] / static_cast<float>(size) * inverse_rms[0];
  each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
    const Block own = load(grad + offset, count), normed = load(x + offset, count) * inverse_rms[0];
    store(grad_x + offset, (own * load(weight + offset, count) - normed * projection) * inverse_rms[0], count);
    if (partial != nullptr) {
      store(partial + offset, load(partial + offset) + own * round_if<T>(rounded, normed));
    }
  });
}

template <class Element, bool normed>
void backward(const RopeBackward& args, int64_t begin, int64_t end, float* const (&partials)[2]) {
  using T = Ordered<Element>;
  const int64_t half = args.angles.rotary_dim / 2, size = args.head_dim;
  alignas(64) float weights[2][kMaxHeadDim], grad[kMaxHeadDim];
  if constexpr (normed) {
    for (int part = 0; part < 2; ++part) {
      each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
        const T* weight = static_cast<const T*>(args.parts[part].weight) + offset;
        store(weights[part] + offset, args.weight_offset + load(weight, count), count);
      });
    }
  }
  RowAngles angles;
  int64_t added[2] = {0, 0};
  for (int64_t row = begin; row < end; ++row) {
    if (args.angles.wide) {
      load_angles<T, float>(args.angles, row, angles);
    } else {
      load_angles<T, T>(args.angles, row, angles);
    }
    for (int part = 0; part < 2; ++part) {
      const RopeBackwardHeads& heads = args.parts[part];
      for (int64_t head = 0; head < heads.heads; ++head) {
        const T* from = static_cast<const T*>(heads.x) + row * heads.row_stride + head * heads.head_stride;
        T* to = static_cast<T*>(heads.y) + (row * heads.heads + head) * size;
        turn_back(from, size, half, angles, grad);
        if constexpr (normed) {
          const T* x =
              static_cast<const T*>(heads.normed) + row * heads.normed_row_stride + head * heads.normed_head_stride;
          norm_back(grad, x, weights[part], size, args.eps, args.rounded, to, partials[part]);
          if (partials[part] != nullptr) carry(partials[part], size, ++added[part]);
        } else {
          each_block(size, VLMFAST_LAMBDA(int64_t offset, auto count) {
            store(to + offset, load(grad + offset, count), count);
          });
        }
      }
    }
  }
}

// float32 is never rounded, so it shares the kernels that do not round.
template <class T, HeadNorm norm, bool wide>
constexpr auto forward_of = forward < T,
               norm == HeadNorm::kTwice &&std::is_same_v<T, float> ? HeadNorm::kOnce : norm,
               !wide && !std::is_same_v < T, float >>
    ;
template <class T>
constexpr auto sum_partials_of = sum_partials<Ordered<T>>;

#define VLMFAST_FORWARD(norm) {VLMFAST_BY_DTYPE(forward_of, norm, false), VLMFAST_BY_DTYPE(forward_of, norm, true)}

}  // namespace

template <>
RopeKernels kernels_at<RopeKernels, CpuLevel::VLMFAST_ISA>() {
  return {{VLMFAST_FORWARD(HeadNorm::kNone), VLMFAST_FORWARD(HeadNorm::kOnce), VLMFAST_FORWARD(HeadNorm::kTwice)},
          {VLMFAST_BY_DTYPE(backward, false), VLMFAST_BY_DTYPE(backward, true)},
          VLMFAST_BY_DTYPE(sum_partials_of)};
}

}  // namespace vlmfast
