// Rotary embedding on the CPU: the ops' arguments, outputs and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "rope/cpu_kernels.h"
#include "rope/ops.h"

namespace vlmfast {
namespace {

using Sections = std::optional<std::vector<int64_t>>;

HeadNorm norm_of(const RopeArguments& call, Variant variant) {
  return !call.has_norm() ? HeadNorm::kNone : variant == Variant::kLlama ? HeadNorm::kTwice : HeadNorm::kOnce;
}

float weight_offset(Variant variant) { return variant == Variant::kGemma ? 1.0f : -0.0f; }

// Makes the kernel arguments of the angles, which must be float32 or of the dtype of the heads.
RopeAngles kernel_angles(const RopeArguments& call) {
  const AngleArguments& angles = call.angles;
  const bool wide = angles.dtype != call.dtype;
  STD_TORCH_CHECK(!wide || angles.dtype == Dtype::kFloat32, "cos must be ", info(call.dtype).name, " or float32, got ",
                  info(angles.dtype).name);
  return {angles.cos.data(),
          angles.sin.data(),
          angles.rows,
          angles.rotary_dim,
          angles.cos.stride(0),
          angles.sin.stride(0),
          {angles.ends[0], angles.ends[1]},
          wide};
}

RopeHeads kernel_heads(const HeadArguments& heads, const Tensor& output) {
  return {heads.heads,       heads.x.data(),   heads.weight.data(), output.mutable_data_ptr(),
          heads.x.stride(0), heads.x.stride(1)};
}

RopeBackwardHeads kernel_heads(const HeadArguments& heads, const Tensor& output, const View<3>& x) {
  return {kernel_heads(heads, output), x.data(), x.stride(0), x.stride(1)};
}

// Returns the number of elements in a row of queries and keys.
int64_t row_size(const RopeArguments& call) { return (call.query.heads + call.key.heads) * call.head_dim; }

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& query, const Tensor& key,
                                        const std::optional<Tensor>& query_weight,
                                        const std::optional<Tensor>& key_weight, const Tensor& cos, const Tensor& sin,
                                        double eps, Variant variant, Sections sections) {
  const RopeArguments call("query", query, "key", key, query_weight, key_weight, cos, sin, sections);
  Tensor query_output = allocate_output(query.sizes(), query, call.dtype);
  Tensor key_output = allocate_output(key.sizes(), key, call.dtype);
  const RopeForward args{static_cast<float>(eps),
                         weight_offset(variant),
                         call.head_dim,
                         kernel_angles(call),
                         {kernel_heads(call.query, query_output), kernel_heads(call.key, key_output)}};
  const auto& by_norm = kernels<RopeKernels>().forward[static_cast<int>(norm_of(call, variant))];
  const auto kernel = by_norm[args.angles.wide ? 1 : 0][call.dtype];
  parallel_rows(call.rows, row_ranges(call.rows, row_size(call)),
                [&](int64_t begin, int64_t end, int64_t) { kernel(args, begin, end); });
  return {std::move(query_output), std::move(key_output)};
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
  Tensor query_output = allocate_output(grad_query.sizes(), grad_query, call.dtype);
  Tensor key_output = allocate_output(grad_key.sizes(), grad_key, call.dtype);
  const int64_t weight_size = weight_grad ? int64_t{call.head_dim} : 0;
  Tensor weights[] = {allocate({weight_size}, grad_query, call.dtype), allocate({weight_size}, grad_query, call.dtype)};
  const RopeBackward args{
      static_cast<float>(eps),
      weight_offset(variant),
      norm_of(call, variant) == HeadNorm::kTwice,
      call.head_dim,
      kernel_angles(call),
      {kernel_heads(call.query, query_output, call.query_x), kernel_heads(call.key, key_output, call.key_x)}};

  const auto& table = kernels<RopeKernels>();
  const int64_t ranges = row_ranges(call.rows, row_size(call)), partial = weight_grad ? partial_size(call.head_dim) : 0;
  const std::unique_ptr<float[]> partials(new float[2 * ranges * partial]());
  const auto of_range = [&](int part, int64_t range) { return &partials[(part * ranges + range) * partial]; };
  const auto backward = table.backward[call.has_norm() ? 1 : 0][call.dtype];
  parallel_rows(call.rows, ranges, [&](int64_t begin, int64_t end, int64_t range) {
    float* const own[2] = {weight_grad ? of_range(0, range) : nullptr, weight_grad ? of_range(1, range) : nullptr};
    backward(args, begin, end, own);
  });
  for (int part = 0; part < 2; ++part) {
    table.sum_partials[call.dtype](weight_size, of_range(part, 0), ranges, weights[part].mutable_data_ptr());
  }
  return {std::move(query_output), std::move(key_output), std::move(weights[0]), std::move(weights[1])};
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
