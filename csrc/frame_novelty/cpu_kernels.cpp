// The novelty of tokens on the CPU, compiled once per instruction set (see types.h). All give the same bits.
#include "frame_novelty/cpu_kernels.h"

#include "common/torch_sum.h"

namespace vlmfast {
namespace {

template <class T>
VLMFAST_INLINE const T* row_of(const FrameRows& rows, int64_t batch, int64_t frame, int64_t token) {
  return static_cast<const T*>(rows.data) + batch * rows.batch_stride + frame * rows.frame_stride +
         token * rows.token_stride;
}

struct Likeness {
  float novelty, length;
};

// Compares a row with another one: one minus their cosine, and the length of the row.
template <class T, class Other>
VLMFAST_INLINE Likeness likeness_of(const T* own, const Other* other, int64_t hidden) {
  float sums[3];  // of the squares, the other's squares, and both together
  torch_sum<T>(hidden, sums, VLMFAST_LAMBDA(int64_t offset, auto count, Block(&total)[3]) {
    const Block x = load(own + offset, count), y = load(other + offset, count);
    total[0] = total[0] + x * x;
    total[1] = total[1] + y * y;
    total[2] = total[2] + x * y;
  });
  const float length = __builtin_sqrtf(sums[0]);
  const float both = sums[0] == sums[1] ? sums[0] : length * __builtin_sqrtf(sums[1]);
  return {1.0f - (both == 0 ? 0.0f : sums[2] / both), length};
}

// Computes the mean of the tokens of a frame, adding four tokens per pass over the mean.
template <class T>
VLMFAST_INLINE void mean_of(const T* first, const FrameRows& rows, float* mean) {
  constexpr int64_t kTogether = 4;
  const int64_t tokens = rows.tokens, stride = rows.token_stride;
  const float inverse = 1.0f / static_cast<float>(tokens);
  for (int64_t token = 0; token < tokens; token += kTogether) {
    const T* from = first + token * stride;
    const int64_t there = tokens - token < kTogether ? tokens - token : kTogether;
    const bool last = token + there == tokens;
    each_block(rows.hidden, VLMFAST_LAMBDA(int64_t offset, auto count) {
      Block sum = load(from + offset, count);
      if (there == kTogether) {
        sum = (sum + load(from + stride + offset, count)) +
              (load(from + 2 * stride + offset, count) + load(from + 3 * stride + offset, count));
      } else {
        for (int64_t next = 1; next < there; ++next) sum = sum + load(from + next * stride + offset, count);
      }
      if (token > 0) sum = load(mean + offset, count) + sum;
      store(mean + offset, last ? sum * inverse : sum, count);
    });
  }
}

template <class T>
void novelty(const FrameNovelty& args, int64_t begin, int64_t end) {
  using Own = Ordered<T>;  // in memory order, like the mean
  const FrameRows rows = args.rows;
  for (int64_t frame = begin; frame < end; ++frame) {
    const Own* own = row_of<Own>(rows, frame / rows.frames, frame % rows.frames, 0);
    float* const mean = args.mean + frame * rows.hidden;
    mean_of(own, rows, mean);
    for (int64_t token = 0; token < rows.tokens; ++token) {
      const Likeness found = likeness_of(own + token * rows.token_stride, mean, rows.hidden);
      args.novelty[frame * rows.tokens + token] = found.novelty;
      args.length[frame * rows.tokens + token] = found.length;
    }
  }
}

template <class T>
void change(const FrameChange& args, int64_t begin, int64_t end) {
  const FrameRows rows = args.rows;
  const int64_t changes = rows.frames - 1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % rows.tokens, frame = row / rows.tokens % changes, batch = row / rows.tokens / changes;
    const T* before = row_of<T>(rows, batch, frame, token);
    args.change[row] = likeness_of(before + rows.frame_stride, before, rows.hidden).novelty;
  }
}

}  // namespace

template <>
FrameNoveltyKernels kernels_at<FrameNoveltyKernels, CpuLevel::VLMFAST_ISA>() {
  return {VLMFAST_BY_DTYPE(novelty), VLMFAST_BY_DTYPE(change)};
}

}  // namespace vlmfast
