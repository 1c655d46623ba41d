// The attention scores on the CPU: arguments, partition of the work and threads. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "attention_scores/cpu_kernels.h"
#include "attention_scores/ops.h"

namespace vlmfast {
namespace {

float softmax_scale(const std::optional<double>& scale, int64_t head_dim) {
  return static_cast<float>(scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(head_dim)));
}

// An array of floats that is aligned to cache lines, so that no aligned vector crosses one.
class Floats {
 public:
  explicit Floats(int64_t count) : lines_(new Line[count / kLine + 1]) {}
  float* data() const { return reinterpret_cast<float*>(lines_.get()); }

 private:
  static constexpr int64_t kLine = 16;
  struct alignas(kLine * sizeof(float)) Line {
    float floats[kLine];
  };
  std::unique_ptr<Line[]> lines_;
};

// Computes the softmax of one token's row of each head, sums it over the heads, and calls sums(batch, sum of each
// token).
template <class Arguments, class Sums>
void sum_row(const Arguments& call, int64_t key_heads, std::optional<double> scale, const View<2>& valid,
             const Sums& sums) {
  const int64_t batch = call.batch, heads = call.heads, tokens = call.tokens, head_dim = call.head_dim;
  const int64_t row = padded(tokens), work = tokens * head_dim;
  const Floats weights(batch * heads * row);

  parallel_rows(batch * heads, row_ranges(batch * heads, work), [&](int64_t begin, int64_t end, int64_t) {
    const Floats room((end - begin) * padded(head_dim));
    while (begin < end) {
      const int64_t b = begin / heads, last = std::min(end, (b + 1) * heads);
      const RowAttention args{softmax_scale(scale, head_dim),
                              tokens,
                              head_dim,
                              {call.query.at(b), call.query.stride(1), 0},
                              {call.key.at(b), call.key.stride(1), call.key.stride(2)},
                              heads / key_heads,
                              valid ? valid.at<bool>(b) : nullptr,
                              weights.data() + b * heads * row};
      kernels<AttentionScoresKernels>().row[call.dtype](args, begin - b * heads, last - b * heads, room.data());
      begin = last;
    }
  });
  std::vector<double> found(tokens);
  for (int64_t b = 0; b < batch; ++b) {
    std::fill(found.begin(), found.end(), 0.0);
    for (int64_t head = 0; head < heads; ++head) {
      const float* from = weights.data() + (b * heads + head) * row;
      for (int64_t token = 0; token < tokens; ++token) found[token] += from[token];
    }
    for (int64_t token = 0; valid && token < tokens; ++token) {
      if (!*valid.at<bool>(b, token)) found[token] = 0;  // even if a NaN in the query makes the whole row NaN
    }
    sums(b, found);
  }
}

Tensor cls_attention(const Tensor& query_tensor, const Tensor& key_tensor, std::optional<double> scale,
                     int64_t cls_index) {
  const ClsArguments call(query_tensor, key_tensor, cls_index);
  Tensor scores = allocate({call.batch, call.tokens - 1}, query_tensor, Dtype::kFloat32);
  float* to = static_cast<float*>(scores.mutable_data_ptr());
  sum_row(call, call.heads, scale, View<2>(), [&](int64_t, const std::vector<double>& sums) {
    to = std::copy(sums.begin(), sums.begin() + call.cls, to);
    to = std::copy(sums.begin() + call.cls + 1, sums.end(), to);
  });
  return scores;
}

Tensor last_row_attention(const Tensor& query_tensor, const Tensor& key_tensor,
                          const std::optional<Tensor>& valid_tensor, std::optional<double> scale) {
  const LastRowArguments call(query_tensor, key_tensor, valid_tensor);
  Tensor scores = allocate({call.batch, call.tokens}, query_tensor, Dtype::kFloat32);
  float* to = static_cast<float*>(scores.mutable_data_ptr());
  sum_row(call, call.key_heads, scale, call.valid, [&](int64_t, const std::vector<double>& sums) {
    for (const double sum : sums) *to++ = static_cast<float>(sum / static_cast<double>(call.heads));
  });
  return scores;
}

// Returns the begin of each segment and, last, the number of tokens.
std::vector<int64_t> segment_bounds(const View<1>& cu_seqlens, int64_t tokens) {
  const int32_t* const from = cu_seqlens.at<int32_t>();
  std::vector<int64_t> bounds(from, from + cu_seqlens.size(0));
  STD_TORCH_CHECK(
      !bounds.empty() && bounds.front() == 0 && bounds.back() == tokens && std::is_sorted(bounds.begin(), bounds.end()),
      "cu_seqlens must rise from 0 to ", tokens, ", the tokens of query");
  return bounds;
}

// The number of queries in a part of the work. It does not depend on the number of threads, so neither does the order
// of the sums.
constexpr int64_t kPartRows = 512;

Tensor received_attention(const Tensor& query_tensor, const Tensor& key_tensor, const std::optional<Tensor>& cu_seqlens,
                          int64_t group, std::optional<double> scale) {
  const ReceivedArguments call(query_tensor, key_tensor, cu_seqlens, group);
  const int64_t heads = call.heads, tokens = call.tokens, head_dim = call.head_dim;
  const auto bounds = cu_seqlens ? segment_bounds(call.cu_seqlens, tokens) : std::vector<int64_t>{0, tokens};

  std::vector<AttentionPart> parts;
  int64_t room = 0, longest = 0;
  for (int64_t head = 0; head < heads; ++head) {
    for (size_t segment = 0; segment + 1 < bounds.size(); ++segment) {
      const int64_t begin = bounds[segment], end = bounds[segment + 1];
      longest = std::max(longest, end - begin);
      for (int64_t row = begin; row < end; row += kPartRows) {
        parts.push_back({head, begin, end, row, std::min(end, row + kPartRows), nullptr});
        room += padded(end - begin);
      }
    }
  }
  const Floats partials(room);
  float* at = partials.data();
  for (AttentionPart& part : parts) {
    part.sums = at;
    at += padded(part.end - part.begin);
  }
  const ReceivedAttention args{softmax_scale(scale, head_dim),
                               head_dim,
                               {call.query.data(), call.query.stride(0), call.query.stride(1)},
                               {call.key.data(), call.key.stride(0), call.key.stride(1)}};
  const int64_t count = static_cast<int64_t>(parts.size());
  const int64_t work = count == 0 ? 0 : heads * tokens * longest / count * head_dim;
  const auto& table = kernels<AttentionScoresKernels>();
  parallel_rows(count, row_ranges(count, work), [&](int64_t begin, int64_t end, int64_t) {
    const Floats workspace(table.received_workspace(head_dim, longest));
    table.received[call.dtype](args, parts.data() + begin, end - begin, workspace.data());
  });
  std::vector<double> sums(tokens);
  for (const AttentionPart& part : parts) {
    for (int64_t token = part.begin; token < part.end; ++token) sums[token] += part.sums[token - part.begin];
  }
  const int64_t groups = tokens / group;
  Tensor scores = allocate({groups}, query_tensor, Dtype::kFloat32);
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

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
