// The ops on masked rows as torch sees them: vlmfast/ops/masked_rows/definition.py defines what they compute.
#pragma once

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
