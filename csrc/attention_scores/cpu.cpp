// The attention scores on the CPU: arguments, parts of the work and threads. The arithmetic is in
// attention_scores_kernels.cpp.
#include "common/cpu.h"

#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "attention_scores/cpu_kernels.h"
#include "attention_scores/schema.h"
#include "common/common.h"

namespace vlmfast {
namespace {

const AttentionScoresKernels& kernels() {
  static const AttentionScoresKernels table =
      at_cpu_level([](auto level) { return attention_scores_kernels<level>(); });
  return table;
}

// A tensor whose last dimension is adjacent in memory: copied once where it is not.
Tensor with_adjacent_elements(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

float scale_of(const std::optional<double>& scale, int64_t size) {
  return static_cast<float>(scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(size)));
}

// Floats at a multiple of 64 bytes, so that no register of them lies across two lines of the cache.
class Floats {
 public:
  explicit Floats(int64_t count) : storage_(new float[count + kLine]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.get());
    data_ = storage_.get() + (kLine - address / sizeof(float) % kLine) % kLine;
  }
  float* data() const { return data_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  std::unique_ptr<float[]> storage_;
  float* data_;
};

// ---- the ops ----

Tensor cls_attention(const Tensor& query, const Tensor& key, std::optional<double> scale, int64_t cls_index) {
  STD_TORCH_CHECK(query.dim() == 3, "query must have shape (B, H, D), got ", query.dim(), " dimensions");
  const int64_t batch = query.size(0), heads = query.size(1), size = query.size(2);
  STD_TORCH_CHECK(key.dim() == 4 && key.size(0) == batch && key.size(1) == heads && key.size(2) > 0 &&
                      key.size(3) == size && heads > 0 && size > 0,
                  "key must have shape (", batch, ", ", heads, ", T, ", size, ") with T >= 1");
  STD_TORCH_CHECK(dtype_of(key) == dtype_of(query), "key must have the dtype of query");
  const int64_t tokens = key.size(2), row = padded_tokens(tokens);
  STD_TORCH_CHECK(-tokens <= cls_index && cls_index < tokens, "cls_index must be within -T and T - 1, got ", cls_index);
  const int64_t cls = cls_index < 0 ? cls_index + tokens : cls_index;
  const Tensor q = with_adjacent_elements(query), k = with_adjacent_elements(key);
  const int64_t sizes[] = {batch, tokens - 1};
  Tensor scores = allocate(sizes, 2, query, aoti_torch_dtype_float32());
  float* const to = static_cast<float*>(scores.mutable_data_ptr());
  const int64_t width = static_cast<int64_t>(q.element_size());
  const char *const q_data = static_cast<const char*>(q.const_data_ptr()), *const k_data = static_cast<const char*>(
                                                                               k.const_data_ptr());
  const Floats weights(batch * heads * row);

  parallel_rows(batch * heads, row_ranges(batch * heads, tokens * size), [&](int64_t begin, int64_t end, int64_t) {
    const Floats room((end - begin) * padded_tokens(size));
    while (begin < end) {
      const int64_t image = begin / heads, last = std::min(end, (image + 1) * heads);
      const ClsAttention args{dtype_of(q),
                              scale_of(scale, size),
                              tokens,
                              size,
                              {q_data + image * q.stride(0) * width, q.stride(1), 0},
                              {k_data + image * k.stride(0) * width, k.stride(1), k.stride(2)},
                              weights.data() + image * heads * row};
      kernels().cls(args, begin - image * heads, last - image * heads, room.data());
      begin = last;
    }
  });
  std::vector<double> sums(tokens);
  for (int64_t image = 0; image < batch; ++image) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t head = 0; head < heads; ++head) {
      const float* from = weights.data() + (image * heads + head) * row;
      for (int64_t token = 0; token < tokens; ++token) sums[token] += from[token];
    }
    float* const image_scores = to + image * (tokens - 1);
    for (int64_t token = 0; token < cls; ++token) image_scores[token] = static_cast<float>(sums[token]);
    for (int64_t token = cls + 1; token < tokens; ++token) image_scores[token - 1] = static_cast<float>(sums[token]);
  }
  return scores;
}

// Where each segment begins and, last, T.
std::vector<int64_t> bounds_of(const std::optional<Tensor>& cu_seqlens, int64_t tokens) {
  if (!cu_seqlens.has_value()) return {0, tokens};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(cu_seqlens->get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int32() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                  "cu_seqlens must be int32 of shape (segments + 1,)");
  const int64_t count = cu_seqlens->size(0), stride = cu_seqlens->stride(0);
  const int32_t* const from = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
  std::vector<int64_t> bounds(count);
  for (int64_t i = 0; i < count; ++i) bounds[i] = from[i * stride];
  STD_TORCH_CHECK(bounds.front() == 0 && bounds.back() == tokens && std::is_sorted(bounds.begin(), bounds.end()),
                  "cu_seqlens must rise from 0 to ", tokens, ", the tokens of query");
  return bounds;
}

// So many queries are one part of the work, whatever the number of threads: sums are then taken in one order.
constexpr int64_t kPartRows = 512;

Tensor received_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& cu_seqlens,
                          int64_t group, std::optional<double> scale) {
  STD_TORCH_CHECK(query.dim() == 3 && query.size(0) > 0 && query.size(2) > 0,
                  "query must have shape (H, T, D) with a head and a channel");
  const int64_t heads = query.size(0), tokens = query.size(1), size = query.size(2);
  STD_TORCH_CHECK(key.dim() == 3 && key.size(0) == heads && key.size(1) == tokens && key.size(2) == size,
                  "key must have the shape of query, (", heads, ", ", tokens, ", ", size, ")");
  STD_TORCH_CHECK(dtype_of(key) == dtype_of(query), "key must have the dtype of query");
  STD_TORCH_CHECK(group > 0 && tokens % group == 0, "group must divide the ", tokens, " tokens, got ", group);
  const std::vector<int64_t> bounds = bounds_of(cu_seqlens, tokens);
  const Tensor q = with_adjacent_elements(query), k = with_adjacent_elements(key);

  std::vector<AttentionPart> parts;
  int64_t room = 0, longest = 0;
  for (int64_t head = 0; head < heads; ++head) {
    for (size_t segment = 0; segment + 1 < bounds.size(); ++segment) {
      const int64_t begin = bounds[segment], end = bounds[segment + 1];
      longest = std::max(longest, end - begin);
      for (int64_t row = begin; row < end; row += kPartRows) {
        parts.push_back({head, begin, end, row, std::min(end, row + kPartRows), nullptr});
        room += padded_tokens(end - begin);
      }
    }
  }
  const Floats partials(room);
  float* at = partials.data();
  for (AttentionPart& part : parts) {
    part.sums = at;
    at += padded_tokens(part.end - part.begin);
  }
  const ReceivedAttention args{dtype_of(q),
                               scale_of(scale, size),
                               size,
                               {q.const_data_ptr(), q.stride(0), q.stride(1)},
                               {k.const_data_ptr(), k.stride(0), k.stride(1)}};
  const int64_t count = static_cast<int64_t>(parts.size());
  if (count > 0) {
    const int64_t work = heads * tokens * longest / count * size;
    parallel_rows(count, row_ranges(count, work), [&](int64_t begin, int64_t end, int64_t) {
      const Floats workspace(kernels().received_workspace(size, longest));
      kernels().received(args, &parts[begin], end - begin, workspace.data());
    });
  }
  std::vector<double> sums(tokens);
  for (const AttentionPart& part : parts) {
    for (int64_t token = part.begin; token < part.end; ++token) sums[token] += part.sums[token - part.begin];
  }
  const int64_t groups = tokens / group;
  Tensor scores = allocate(&groups, 1, query, aoti_torch_dtype_float32());
  float* const to = static_cast<float*>(scores.mutable_data_ptr());
  for (int64_t i = 0; i < groups; ++i) {
    double sum = 0;
    for (int64_t token = i * group; token < (i + 1) * group; ++token) sum += sums[token];
    to[i] = static_cast<float>(sum / static_cast<double>(heads * group));
  }
  return scores;
}

}  // namespace
}  // namespace vlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(vlmfast_native, m) {
  m.def(vlmfast::kClsAttentionSchema);
  m.def(vlmfast::kReceivedAttentionSchema);
}

STABLE_TORCH_LIBRARY_IMPL(vlmfast_native, CPU, m) {
  m.impl("cls_attention", TORCH_BOX(&vlmfast::cls_attention));
  m.impl("received_attention", TORCH_BOX(&vlmfast::received_attention));
}
