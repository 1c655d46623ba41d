// The ops on masked rows as torch sees them; vlmfast/ops/masked_rows.py defines what they compute.
#pragma once

namespace vlmfast {

inline constexpr const char kRowIndexSchema[] = "row_index(Tensor mask) -> Tensor";

inline constexpr const char kDeepstackAddSchema[] =
    "deepstack_add(Tensor hidden_states, Tensor visual_pos_masks, Tensor visual_embeds, Tensor? index=None) -> Tensor";

inline constexpr const char kPlaceEmbeddingsSchema[] =
    "place_embeddings(Tensor inputs_embeds, Tensor mask, Tensor image_embeds, Tensor? index=None) -> Tensor";

inline constexpr const char kSplitRowsSchema[] =
    "split_rows(Tensor x, Tensor mask, SymInt rows, Tensor? index=None, bool rest=True) -> (Tensor, Tensor)";

inline constexpr const char kCompactTokensSchema[] =
    "compact_tokens(Tensor tokens, Tensor invalid, SymInt keep, Tensor? order=None, bool pad_left=False)"
    " -> (Tensor, Tensor, Tensor)";

inline constexpr const char kCompactTokensBackwardSchema[] =
    "compact_tokens_backward(Tensor grad_tokens, Tensor invalid, bool pad_left=False) -> Tensor";

}  // namespace vlmfast
