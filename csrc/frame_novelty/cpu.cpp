// The novelty of tokens on the CPU: the ops' arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <tuple>

#include "frame_novelty/cpu_kernels.h"
#include "frame_novelty/ops.h"

namespace vlmfast {
namespace {

FrameRows rows_of(const FrameArguments& call) {
  const View<4>& rows = call.rows;
  return {rows.data(), call.frames, call.tokens, call.hidden, rows.stride(0), rows.stride(1), rows.stride(2)};
}

std::tuple<Tensor, Tensor, Tensor> frame_novelty(const Tensor& frames) {
  const FrameArguments call(frames);
  Tensor mean = allocate({call.batch, call.frames, call.hidden}, frames, Dtype::kFloat32);
  Tensor novelty = allocate({call.batch, call.frames, call.tokens}, frames, Dtype::kFloat32);
  Tensor length = allocate({call.batch, call.frames, call.tokens}, frames, Dtype::kFloat32);
  const FrameNovelty args{rows_of(call), static_cast<float*>(mean.mutable_data_ptr()),
                          static_cast<float*>(novelty.mutable_data_ptr()),
                          static_cast<float*>(length.mutable_data_ptr())};
  const auto run = kernels<FrameNoveltyKernels>().novelty[call.dtype];
  const int64_t count = call.batch * call.frames;
  parallel_rows(count, row_ranges(count, call.tokens * call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { run(args, begin, end); });
  return {std::move(mean), std::move(novelty), std::move(length)};
}

Tensor frame_change(const Tensor& frames) {
  const FrameArguments call(frames);
  Tensor change = allocate({call.batch, call.changes(), call.tokens}, frames, Dtype::kFloat32);
  const FrameChange args{rows_of(call), static_cast<float*>(change.mutable_data_ptr())};
  const auto run = kernels<FrameNoveltyKernels>().change[call.dtype];
  const int64_t count = call.batch * call.changes() * call.tokens;
  parallel_rows(count, row_ranges(count, call.hidden),
                [&](int64_t begin, int64_t end, int64_t) { run(args, begin, end); });
  return change;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
