// The arguments and schemas of rotary embedding. vlmfast/ops/rope/definition.py defines what the ops compute.
#pragma once

#include <optional>
#include <vector>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

// The angles of the rows. With sections there are three tables, of time, height and width, and each section of the
// frequencies uses one.
struct AngleArguments {
  Leading all_rows;
  Size rotary_dim{"rotary_dim"};
  FloatDtype dtype;
  View<2> cos, sin;
  int64_t rows;     // rows of one axis: those of one sequence, or of the whole batch
  int64_t ends[2];  // the ends of the first two sections, in frequencies

  AngleArguments(const Tensor& cos_tensor, const Tensor& sin_tensor,
                 const std::optional<std::vector<int64_t>>& sections)
      : cos("cos", cos_tensor, {all_rows, rotary_dim}, dtype),
        sin("sin", sin_tensor, {all_rows, rotary_dim}, dtype),
        rows(sections ? all_rows / 3 : int64_t{all_rows}),
        ends{half(), half()} {
    STD_TORCH_CHECK(rotary_dim > 0 && rotary_dim % 2 == 0, "cos must have an even last size, got ", rotary_dim);
    if (!sections) return;
    STD_TORCH_CHECK(sections->size() == 3 && all_rows % 3 == 0, "sections must be three sizes, as cos has axes, got ",
                    sections->size());
    ends[0] = (*sections)[0];
    ends[1] = ends[0] + (*sections)[1];
    STD_TORCH_CHECK(0 <= ends[0] && ends[0] <= ends[1] && ends[1] + (*sections)[2] == half() && ends[1] <= half(),
                    "sections must sum to half of rotary_dim, ", half());
  }

  int64_t half() const { return rotary_dim / 2; }
};

// Heads of queries or keys, with the weight of their norm.
struct HeadArguments {
  Size heads{"heads"};
  View<3> x;
  View<1> weight;

  template <class MaybeTensor>
  HeadArguments(const char* name, const MaybeTensor& tensor, const char* weight_name,
                const std::optional<Tensor>& weight_tensor, Leading& rows, Size& head_dim, FloatDtype& dtype)
      : x(name, tensor, {rows, heads, head_dim}, dtype), weight(weight_name, weight_tensor, {head_dim}, dtype) {}
};

struct RopeArguments {
  Leading rows;
  Size head_dim = Size("head_dim").at_least(2).at_most(kMaxHeadDim);
  FloatDtype dtype;
  HeadArguments query, key;
  AngleArguments angles;

  RopeArguments(const char* query_name, const Tensor& query_tensor, const char* key_name, const Tensor& key_tensor,
                const std::optional<Tensor>& query_weight, const std::optional<Tensor>& key_weight,
                const Tensor& cos_tensor, const Tensor& sin_tensor, const std::optional<std::vector<int64_t>>& sections)
      : query(query_name, query_tensor, "query_weight", query_weight, rows, head_dim, dtype),
        key(key_name, key_tensor, "key_weight", key_weight, rows, head_dim, dtype),
        angles(cos_tensor, sin_tensor, sections) {
    STD_TORCH_CHECK(head_dim % 2 == 0, query_name, " must have an even head_dim, got ", head_dim);
    STD_TORCH_CHECK(angles.rotary_dim <= head_dim, "cos must have at most ", head_dim, " angles, the head_dim of ",
                    query_name, ", got ", angles.rotary_dim);
    STD_TORCH_CHECK(rows == 0 || (angles.rows > 0 && rows % angles.rows == 0), "cos must have the rows of ", query_name,
                    ", ", int64_t{rows}, ", or those of one batch, got ", angles.rows);
    STD_TORCH_CHECK(query_weight.has_value() == key_weight.has_value(),
                    "query_weight and key_weight must both be given, or none");
  }

  bool has_norm() const { return query.weight.data() != nullptr; }
};

// In the backward, `query` and `key` are the gradients of the outputs; query_x and key_x are the inputs of the norm.
struct RopeBackwardArguments : RopeArguments {
  View<3> query_x, key_x;

  RopeBackwardArguments(const Tensor& grad_query, const Tensor& grad_key, const std::optional<Tensor>& query_tensor,
                        const std::optional<Tensor>& key_tensor, const std::optional<Tensor>& query_weight,
                        const std::optional<Tensor>& key_weight, const Tensor& cos_tensor, const Tensor& sin_tensor,
                        const std::optional<std::vector<int64_t>>& sections)
      : RopeArguments("grad_query", grad_query, "grad_key", grad_key, query_weight, key_weight, cos_tensor, sin_tensor,
                      sections),
        query_x("query", query_tensor, {rows, query.heads, head_dim}, dtype),
        key_x("key", key_tensor, {rows, key.heads, head_dim}, dtype) {
    STD_TORCH_CHECK(!has_norm() || (query_tensor && key_tensor), "query and key must be given where there are weights");
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                            \
  OP(qk_norm_rope,                                                                                                 \
     "(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, Tensor cos, Tensor sin, "               \
     "float eps=1e-6, str variant=\"llama\", SymInt[]? sections=None) -> (Tensor, Tensor)")                        \
  OP(qk_norm_rope_backward,                                                                                        \
     "(Tensor grad_query, Tensor grad_key, Tensor? query, Tensor? key, Tensor? query_weight, Tensor? key_weight, " \
     "Tensor cos, Tensor sin, float eps=1e-6, str variant=\"llama\", SymInt[]? sections=None, "                    \
     "bool weight_grad=True) -> (Tensor, Tensor, Tensor, Tensor)")
