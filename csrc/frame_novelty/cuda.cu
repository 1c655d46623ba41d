// The novelty of tokens on CUDA. vlmfast/ops/frame_novelty/definition.py defines what is computed.
//
// Both ops are bound by memory. frame_novelty first computes the means in a launch of its own: each warp adds up some
// columns of every eighth token, and a frame of 256 tokens of 3584 elements is spread over 14 blocks. In the second
// launch a warp takes four tokens, so that the float32 mean, which has twice the bytes of a row in half precision, is
// read once for the four. In frame_change a warp takes one token; the same token of the frame before comes from the L2
// cache, where another warp has just read it.
#include <tuple>
#include <type_traits>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "frame_novelty/ops.h"

namespace vlmfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTogether = 4;  // tokens that a warp compares with one load of the mean

struct Sizes {
  int64_t batch, frames, tokens;
  int hidden;
};

// ---- means ----

// Limited (frame_mean_kernel): a block adds up some columns of a whole frame: of a few small frames there are too few
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    frame_mean_kernel(Input<scalar_t, 4> rows,   // (batch, frames, tokens, hidden)
                      float* __restrict__ mean,  // (batch, frames, hidden)
                      int64_t blocks,            // blocks of columns along a row
                      Sizes sizes) {
  constexpr int kColumns = kWarp * kVec;
  __shared__ float sums[kWarps][kColumns];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t works = sizes.batch * sizes.frames * blocks;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t frame = work / blocks;
    const int first = static_cast<int>(work % blocks) * kColumns, column = first + lane * kVec;
    float own[kVec] = {};
    if (column < sizes.hidden) {
#pragma unroll 4
      for (int64_t token = warp; token < sizes.tokens; token += kWarps) {
        const auto values =
            Vector<scalar_t, kVec>::load(rows.at(frame / sizes.frames, frame % sizes.frames, token) + column);
#pragma unroll
        for (int i = 0; i < kVec; ++i) own[i] += values[i];
      }
    }
    __syncthreads();  // the columns before these are done
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[warp][i * kWarp + lane] = own[i];  // this layout has no bank conflicts
    __syncthreads();
    for (int place = threadIdx.x; place < kColumns; place += kThreads) {
      const int at = first + place;
      float sum = 0.f;
#pragma unroll
      for (int part = 0; part < kWarps; ++part) sum += sums[part][place % kVec * kWarp + place / kVec];
      if (at < sizes.hidden) mean[frame * sizes.hidden + at] = sum / static_cast<float>(sizes.tokens);
    }
  }
}

// ---- one row against another ----

// kSize adjacent elements in as many loads of at most 16 bytes as they need: a float32 mean needs two for the elements
// that rows in half precision load at once.
template <typename scalar_t, int kSize>
struct Wide {
  static constexpr int kPart = sizeof(scalar_t) * kSize > kVectorBytes ? kVectorBytes / sizeof(scalar_t) : kSize;
  Vector<scalar_t, kPart> parts[kSize / kPart];

  __device__ __forceinline__ static Wide load(const scalar_t* from) {
    Wide wide;
#pragma unroll
    for (int part = 0; part < kSize / kPart; ++part) {
      wide.parts[part] = Vector<scalar_t, kPart>::load(from + part * kPart);
    }
    return wide;
  }
  __device__ __forceinline__ float operator[](int i) const { return parts[i / kPart][i % kPart]; }
};

struct Likeness {
  float novelty, length;

  __device__ __forceinline__ Likeness(float dot, float squares, float other_squares) : length(sqrtf(squares)) {
    const float both = squares == other_squares ? squares : length * sqrtf(other_squares);
    novelty = 1.f - (both == 0.f ? 0.f : dot / both);
  }
};

// Compares `count` rows, at most kRows, with one other row. Calls finish(row, likeness) for each in the warp's first
// lane.
template <int kVec, int kRows, typename scalar_t, typename other_t, typename Finish>
__device__ __forceinline__ void hold_against(const scalar_t* const (&own)[kRows], const other_t* other, int count,
                                             int hidden, Finish finish) {
  const int lane = threadIdx.x % kWarp;
  float sums[2 * kRows + 1] = {};            // dot and squares of each row, then the other's squares
  constexpr int kSteps = kRows > 1 ? 1 : 4;  // unrolled: one step of several rows has enough loads
#pragma unroll kSteps
  for (int column = lane * kVec; column < hidden; column += kWarp * kVec) {
    const auto held = Wide<other_t, kVec>::load(other + column);
    Vector<scalar_t, kVec> values[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) values[row] = Vector<scalar_t, kVec>::load(own[row] + column);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float y = held[i];
      sums[2 * kRows] = fmaf(y, y, sums[2 * kRows]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float x = values[row][i];
        sums[2 * row] = fmaf(x, y, sums[2 * row]);
        sums[2 * row + 1] = fmaf(x, x, sums[2 * row + 1]);
      }
    }
  }
  __shared__ GroupSum<kWarp, 2 * kRows + 1> group_sum;
  group_sum.add_up(sums, 0);
  if (lane != 0) return;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row < count) finish(row, Likeness(sums[2 * row], sums[2 * row + 1], sums[2 * kRows]));
  }
}

// Calls function(work) for the items of a warp, in a loop over the grid.
template <typename Function>
__device__ __forceinline__ void for_works(int64_t works, Function function) {
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t work = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; work < works; work += step) function(work);
}

// Limited (frame_novelty_kernel): a warp takes four tokens at once: of a few small frames there are too few warps
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(kThreads, 1)
    frame_novelty_kernel(Input<scalar_t, 4> rows,         // (batch, frames, tokens, hidden)
                         const float* __restrict__ mean,  // (batch, frames, hidden)
                         float* __restrict__ novelty,     // (batch, frames, tokens)
                         float* __restrict__ length,      // (batch, frames, tokens)
                         int64_t blocks,                  // groups of kTogether tokens per frame
                         Sizes sizes) {
  for_works(sizes.batch * sizes.frames * blocks, [&](int64_t work) {
    const int64_t first = work % blocks * kTogether, frame = work / blocks;
    const int count = static_cast<int>(min(sizes.tokens - first, int64_t{kTogether}));
    const scalar_t* own[kTogether];
#pragma unroll
    for (int row = 0; row < kTogether; ++row) {  // missing rows repeat the last one
      own[row] = rows.at(frame / sizes.frames, frame % sizes.frames, first + min(row, count - 1));
    }
    hold_against<kVec>(own, mean + frame * sizes.hidden, count, sizes.hidden, [&](int row, Likeness found) {
      const int64_t at = frame * sizes.tokens + first + row;
      novelty[at] = found.novelty;
      length[at] = found.length;
    });
  });
}

// Limited (frame_change_kernel): a warp compares one token: of a few small frames there are too few warps
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    frame_change_kernel(Input<scalar_t, 4> rows,     // (batch, frames, tokens, hidden)
                        float* __restrict__ change,  // (batch, frames - 1, tokens)
                        Sizes sizes) {
  const int64_t changes = sizes.frames - 1;
  for_works(sizes.batch * changes * sizes.tokens, [&](int64_t work) {
    const int64_t token = work % sizes.tokens, frame = work / sizes.tokens;
    const scalar_t* const before = rows.at(frame / changes, frame % changes, token);
    const scalar_t* const own[1] = {rows.at(frame / changes, frame % changes + 1, token)};
    hold_against<kVec>(own, before, 1, sizes.hidden, [&](int, Likeness found) { change[work] = found.novelty; });
  });
}

// ---- launches ----

// Calls function(scalar_t(), vector width), the width as an integral constant.
template <typename Function>
void with_types(const FrameArguments& args, Function function) {
  with_dtype(args.dtype, [&](auto zero) {
    if (vectors_fit(kVectorBytes, args.rows)) {
      function(zero, std::integral_constant<int, kVectorBytes / sizeof(zero)>());
    } else {
      function(zero, std::integral_constant<int, 1>());
    }
  });
}

Sizes sizes_of(const FrameArguments& args) {
  return {args.batch, args.frames, args.tokens, static_cast<int>(args.hidden)};
}

std::tuple<Tensor, Tensor, Tensor> frame_novelty(const Tensor& frames) {
  const FrameArguments args(frames);
  Tensor mean = allocate({args.batch, args.frames, args.hidden}, frames, Dtype::kFloat32);
  Tensor novelty = allocate({args.batch, args.frames, args.tokens}, frames, Dtype::kFloat32);
  Tensor length = allocate({args.batch, args.frames, args.tokens}, frames, Dtype::kFloat32);
  const Sizes sizes = sizes_of(args);
  const int64_t count = sizes.batch * sizes.frames;
  if (count == 0) return {mean, novelty, length};
  const DeviceScope scope(frames);
  with_types(args, [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    constexpr int kVec = decltype(width)::value, kColumns = kWarp * kVec;
    const auto rows = scope.input<scalar_t>(args.rows);
    float* const mean_data = scope.output<float>(mean);
    const int64_t along = (sizes.hidden + kColumns - 1) / kColumns;
    const int64_t blocks = (sizes.tokens + kTogether - 1) / kTogether;
    launch_blocks(scope, frame_mean_kernel<scalar_t, kVec>, count * along, kThreads, 0, rows, mean_data, along, sizes);
    launch_blocks(scope, frame_novelty_kernel<scalar_t, kVec>, (count * blocks + kWarps - 1) / kWarps, kThreads, 0,
                  rows, static_cast<const float*>(mean_data), scope.output<float>(novelty), scope.output<float>(length),
                  blocks, sizes);
  });
  return {mean, novelty, length};
}

Tensor frame_change(const Tensor& frames) {
  const FrameArguments args(frames);
  Tensor change = allocate({args.batch, args.changes(), args.tokens}, frames, Dtype::kFloat32);
  if (change.numel() == 0) return change;
  const DeviceScope scope(frames);
  with_types(args, [&](auto zero, auto width) {
    using scalar_t = decltype(zero);
    const int64_t works = args.batch * args.changes() * args.tokens;
    launch_blocks(scope, frame_change_kernel<scalar_t, decltype(width)::value>, (works + kWarps - 1) / kWarps, kThreads,
                  0, scope.input<scalar_t>(args.rows), scope.output<float>(change), sizes_of(args));
  });
  return change;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
