// The arguments and schemas of the ops on masked rows. vlmfast/ops/masked_rows/definition.py defines what they compute.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

// ---- arguments, checked once for the CPU and CUDA ----

struct MaskArguments {
  Size batch{"batch"}, tokens{"tokens"};
  View<1> mask;

  explicit MaskArguments(const Tensor& mask_tensor) : mask("mask", mask_tensor, {{batch, tokens}}, Dtype::kBool) {
    check_within("the positions of mask", mask.size(0), 0, kMostInt);
  }
};

// Rows, a mask of some of them, and optionally the numbers of the masked rows.
struct MaskedRowsArguments {
  Size batch{"batch"}, tokens{"tokens"}, hidden{"hidden"};
  FloatDtype dtype;
  View<2> x;
  View<1> mask, index;

  MaskedRowsArguments(const char* x_name, const Tensor& x_tensor, const char* mask_name, const Tensor& mask_tensor,
                      const std::optional<Tensor>& index_tensor)
      : x(x_name, x_tensor, {{batch, tokens}, hidden}, dtype),
        mask(mask_name, mask_tensor, {{batch, tokens}}, Dtype::kBool),
        index("index", index_tensor, {{batch, tokens}}, Dtype::kInt32) {
    check_within("the positions of a mask", rows(), 0, kMostInt);
  }

  int64_t rows() const { return x.size(0); }
};

struct DeepstackArguments : MaskedRowsArguments {
  Size visual{"visual"};
  View<2> embeds;

  DeepstackArguments(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index_tensor)
      : MaskedRowsArguments("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks, index_tensor),
        embeds("visual_embeds", visual_embeds, {visual, hidden}, dtype) {}
};

struct PlaceArguments : MaskedRowsArguments {
  Size visual{"visual"};
  View<2> embeds;

  PlaceArguments(const Tensor& inputs_embeds, const Tensor& mask_tensor, const Tensor& image_embeds,
                 const std::optional<Tensor>& index_tensor)
      : MaskedRowsArguments("inputs_embeds", inputs_embeds, "mask", mask_tensor, index_tensor),
        embeds("image_embeds", image_embeds, {visual, hidden}, dtype) {}
};

struct SplitArguments : MaskedRowsArguments {
  SplitArguments(const Tensor& x_tensor, const Tensor& mask_tensor, int64_t count,
                 const std::optional<Tensor>& index_tensor)
      : MaskedRowsArguments("x", x_tensor, "mask", mask_tensor, index_tensor) {
    check_within("rows", count, 0, rows());
  }
};

struct CompactArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMostInt), hidden{"hidden"}, kept_count;
  FloatDtype dtype;
  View<2> x;
  View<1> invalid, order;

  CompactArguments(const Tensor& tokens_tensor, const Tensor& invalid_tensor, int64_t keep,
                   const std::optional<Tensor>& order_tensor)
      : kept_count("keep", keep),
        x("tokens", tokens_tensor, {{batch, tokens}, hidden}, dtype),
        invalid("invalid", invalid_tensor, {{batch, tokens}}, Dtype::kBool),
        order("order", order_tensor, {{batch, kept_count}}, Dtype::kInt64) {
    check_within("keep", keep, 0, tokens);
  }
};

struct CompactGradientArguments {
  Size batch{"batch"}, tokens = Size("tokens").at_most(kMostInt), hidden{"hidden"}, kept_count{"keep"};
  FloatDtype dtype;
  View<1> invalid;
  View<2> grad;

  CompactGradientArguments(const Tensor& grad_tensor, const Tensor& invalid_tensor)
      : invalid("invalid", invalid_tensor, {{batch, tokens}}, Dtype::kBool),
        grad("grad_tokens", grad_tensor, {{batch, kept_count}, hidden}, dtype) {
    check_within("keep", kept_count, 0, tokens);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                                          \
  OP(row_index, "(Tensor mask) -> Tensor")                                                                       \
  OP(deepstack_add,                                                                                              \
     "(Tensor hidden_states, Tensor visual_pos_masks, Tensor visual_embeds, Tensor? index=None) -> Tensor")      \
  OP(place_embeddings, "(Tensor inputs_embeds, Tensor mask, Tensor image_embeds, Tensor? index=None) -> Tensor") \
  OP(split_rows, "(Tensor x, Tensor mask, SymInt rows, Tensor? index=None, bool rest=True) -> (Tensor, Tensor)") \
  OP(compact_tokens,                                                                                             \
     "(Tensor tokens, Tensor invalid, SymInt keep, Tensor? order=None, bool pad_left=False)"                     \
     " -> (Tensor, Tensor, Tensor)")                                                                             \
  OP(compact_tokens_backward, "(Tensor grad_tokens, Tensor invalid, bool pad_left=False) -> Tensor")
