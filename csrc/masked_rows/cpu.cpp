// The ops on masked rows on the CPU: arguments, outputs, threads, and the rows that are only moved.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/row_moves.h"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

// Rows, and a mask of some of them.
struct MaskedRows {
  Size batch{"batch"}, tokens{"tokens"}, hidden{"hidden"};
  FloatDtype dtype;
  View<2> x;
  View<1> mask;

  MaskedRows(const char* x_name, const Tensor& x_tensor, const char* mask_name, const Tensor& mask_tensor)
      : x(x_name, x_tensor, {{batch, tokens}, hidden}, dtype),
        mask(mask_name, mask_tensor, {{batch, tokens}}, Dtype::kBool) {}

  int64_t rows() const { return x.size(0); }
  bool masked(int64_t row) const { return *mask.at<uint8_t>(row) != 0; }

  // Refuses a mask that is not true at `expected` positions, and an index that is not the mask's. The numbers of the
  // index are not read: on a CPU to count anew is cheaper.
  void check_count(const char* mask_name, int64_t expected, const std::optional<Tensor>& index) {
    const uint8_t* const begin = mask.at<uint8_t>();
    const int64_t found = rows() - std::count(begin, begin + rows(), 0);
    STD_TORCH_CHECK(found == expected, mask_name, " must be true at as many positions as there are rows, ", expected,
                    ", got ", found);
    View("index", index, {batch, tokens}, Dtype::kInt32);
  }
};

// function(token, slot, invalid) for each token that compact_tokens keeps: both are counted over the whole batch.
template <class Function>
void each_kept(const View<1>& mask, int64_t batch, int64_t tokens, int64_t kept_count, bool pad_left,
               const Function& function) {
  const uint8_t* const invalid = mask.at<uint8_t>();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = b * tokens, end = begin + tokens, first = b * kept_count, last = first + kept_count;
    const int64_t valid = std::min<int64_t>(std::count(invalid + begin, invalid + end, 0), kept_count);
    int64_t valid_slot = pad_left ? last - valid : first, invalid_slot = pad_left ? first : first + valid;
    const int64_t valid_end = valid_slot + valid, invalid_end = invalid_slot + kept_count - valid;
    for (int64_t token = begin; token < end; ++token) {
      const bool masked = invalid[token] != 0;
      int64_t& slot = masked ? invalid_slot : valid_slot;
      if (slot < (masked ? invalid_end : valid_end)) function(token, slot++, masked);
    }
  }
}

Tensor row_index(const Tensor& mask_tensor) {
  Size batch("batch"), tokens("tokens");
  const View mask("mask", mask_tensor, {{batch, tokens}}, Dtype::kBool);
  STD_TORCH_CHECK(mask.numel() <= std::numeric_limits<int32_t>::max(),
                  "mask must have fewer than 2**31 positions, got ", mask.numel());
  Tensor index = allocate({batch, tokens}, mask_tensor, Dtype::kInt32);
  int32_t* const numbers = static_cast<int32_t*>(index.mutable_data_ptr());
  int32_t rank = 0;
  for (int64_t position = 0; position < mask.numel(); ++position) {
    numbers[position] = *mask.at<uint8_t>(position) != 0 ? rank++ : ~rank;
  }
  return index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  MaskedRows text("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks);
  Size visual("visual");
  const View embeds("visual_embeds", visual_embeds, {visual, text.hidden}, text.dtype);
  text.check_count("visual_pos_masks", visual, index);
  std::vector<const char*> copied(text.rows()), added(text.rows());
  for (int64_t row = 0, number = 0; row < text.rows(); ++row) {
    copied[row] = text.x.at(row);
    if (text.masked(row)) added[row] = embeds.at(number++);
  }
  return written_rows(hidden_states.sizes(), hidden_states, text.hidden, copied.data(), added.data());
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  MaskedRows text("inputs_embeds", inputs_embeds, "mask", mask);
  Size visual("visual");
  const View embeds("image_embeds", image_embeds, {visual, text.hidden}, text.dtype);
  text.check_count("mask", visual, index);
  std::vector<const char*> copied(text.rows());
  for (int64_t row = 0, number = 0; row < text.rows(); ++row) {
    copied[row] = text.masked(row) ? embeds.at(number++) : text.x.at(row);
  }
  return written_rows(inputs_embeds.sizes(), inputs_embeds, text.hidden, copied.data());
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x, const Tensor& mask, int64_t rows,
                                      const std::optional<Tensor>& index, bool rest) {
  MaskedRows all("x", x, "mask", mask);
  all.check_count("mask", rows, index);
  std::vector<const char*> masked, others(all.rows());
  masked.reserve(rows);
  for (int64_t row = 0; row < all.rows(); ++row) {
    if (all.masked(row)) {
      masked.push_back(all.x.at(row));
    } else {
      others[row] = all.x.at(row);
    }
  }
  Tensor taken = written_rows({rows, all.hidden}, x, all.hidden, masked.data());
  return {std::move(taken),
          rest ? written_rows(x.sizes(), x, all.hidden, others.data()) : allocate({int64_t{0}}, x, all.dtype)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens, const Tensor& invalid, int64_t keep,
                                                  const std::optional<Tensor>& order, bool pad_left) {
  MaskedRows all("tokens", tokens, "invalid", invalid);
  check_within("keep", keep, 0, all.tokens);
  Size kept_count("keep", keep);
  const View given("order", order, {{all.batch, kept_count}}, Dtype::kInt64);
  Tensor kept_invalid = allocate({all.batch, keep}, tokens, Dtype::kBool);
  Tensor kept_order = allocate({all.batch, keep}, tokens, Dtype::kInt64);
  bool* const slot_invalid = static_cast<bool*>(kept_invalid.mutable_data_ptr());
  int64_t* const slot_token = static_cast<int64_t*>(kept_order.mutable_data_ptr());
  const int64_t slots = all.batch * keep;
  std::vector<const char*> sources(slots);
  const auto fill = [&](int64_t token, int64_t slot, bool masked) {
    slot_token[slot] = token % all.tokens;
    slot_invalid[slot] = masked;
    if (!masked) sources[slot] = all.x.at(token);
  };
  if (order.has_value()) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t position = *given.at<int64_t>(slot);
      check_within("order", position, 0, all.tokens - 1);
      const int64_t token = slot / keep * all.tokens + position;
      fill(token, slot, all.masked(token));
    }
  } else {
    each_kept(all.mask, all.batch, all.tokens, keep, pad_left, fill);
  }
  Tensor packed = written_rows({all.batch, keep, all.hidden}, tokens, all.hidden, sources.data());
  return {std::move(packed), std::move(kept_invalid), std::move(kept_order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tokens, const Tensor& invalid, bool pad_left) {
  Size batch("batch"), tokens("tokens"), hidden("hidden");
  FloatDtype dtype;
  const View mask("invalid", invalid, {{batch, tokens}}, Dtype::kBool);
  Size kept_count = Size("keep").at_most(tokens);
  const View grads("grad_tokens", grad_tokens, {{batch, kept_count}, hidden}, dtype);
  std::vector<const char*> sources(batch * tokens);
  each_kept(mask, batch, tokens, kept_count, pad_left, [&](int64_t token, int64_t slot, bool masked) {
    if (!masked) sources[token] = grads.at(slot);
  });
  return written_rows({batch, tokens, hidden}, grad_tokens, hidden, sources.data());
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
