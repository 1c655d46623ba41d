// Patch-info mining on the CPU: arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "patch_mining/cpu_kernels.h"
#include "patch_mining/ops.h"

namespace vlmfast {
namespace {

Mining arguments(const MiningArguments& call, int64_t scale, double eps, void* y) {
  if (call.blocks) check_ascending("blocks", call.blocks, call.total);
  const auto rows = [](const View<3>& view) { return TokenRows{view.data(), view.stride(0), view.stride(1)}; };
  return {call.tokens,
          call.channels,
          scale,
          call.columns,
          static_cast<float>(eps),
          rows(call.query),
          rows(call.grad_output),
          call.feature_map.data(),
          {call.feature_map.stride(0), call.feature_map.stride(1), call.feature_map.stride(2)},
          call.blocks ? call.blocks.at<int64_t>() : nullptr,
          call.blocks.stride(0),
          y,
          nullptr,
          call.height,
          call.width};
}

template <class Kernel>
void run(const MiningArguments& call, const Mining& args, Kernel* kernel) {
  const int64_t rows = call.batch * call.tokens;
  const int64_t floats = kernels<PatchMiningKernels>().workspace(args.channels, args.scale);
  parallel_rows(rows, row_ranges(rows, args.channels * args.scale * args.scale),
                [&](int64_t begin, int64_t end, int64_t) {
    if (begin == end) return;
    const std::unique_ptr<float[]> workspace(new float[floats]);
    kernel(args, begin, end, workspace.get());
  });
}

Tensor mine_patches(const Tensor& query, const Tensor& feature_map, int64_t scale, const std::optional<Tensor>& blocks,
                    double norm_eps) {
  const MiningArguments call(query, feature_map, scale, blocks);
  Tensor mined = allocate({call.batch, call.tokens, call.channels}, query, call.dtype);
  run(call, arguments(call, scale, norm_eps, mined.mutable_data_ptr()),
      kernels<PatchMiningKernels>().forward[call.dtype]);
  return mined;
}

std::tuple<Tensor, Tensor> mine_patches_backward(const Tensor& grad_output, const Tensor& query,
                                                 const Tensor& feature_map, int64_t scale,
                                                 const std::optional<Tensor>& blocks, double norm_eps) {
  const MiningArguments call(query, feature_map, scale, blocks, grad_output);
  Tensor grad_query = allocate({call.batch, call.tokens, call.channels}, query, call.dtype);
  Tensor grad_map = allocate_output({call.batch, call.channels, call.height, call.width}, query, call.dtype);
  Mining args = arguments(call, scale, norm_eps, grad_query.mutable_data_ptr());
  args.grad_map = grad_map.mutable_data_ptr();
  if (call.tokens < call.total) std::memset(args.grad_map, 0, grad_map.numel() * call.feature_map.width());
  run(call, args, kernels<PatchMiningKernels>().backward[call.dtype]);
  return {std::move(grad_query), std::move(grad_map)};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
