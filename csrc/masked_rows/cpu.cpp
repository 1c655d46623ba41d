// The ops on masked rows on the CPU: arguments, outputs, threads, and the rows that are only moved.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/row_moves.h"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

bool masked_at(const View<1>& mask, int64_t position) { return *mask.at<uint8_t>(position) != 0; }

// Refuses a mask that is not true at exactly `expected` positions. The CPU ops ignore a given index: counting the mask
// is cheaper than reading it.
void check_count(const View<1>& mask, int64_t expected) {
  const uint8_t* const begin = mask.at<uint8_t>();
  const int64_t found = mask.size(0) - std::count(begin, begin + mask.size(0), 0);
  STD_TORCH_CHECK(found == expected, "the mask must be true at as many positions as there are rows, ", expected,
                  ", got ", found);
}

// Calls function(token, slot, invalid) for each token that compact_tokens keeps. token and slot are counted over the
// batch.
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
  const MaskArguments call(mask_tensor);
  Tensor index = allocate({call.batch, call.tokens}, mask_tensor, Dtype::kInt32);
  int32_t* const numbers = static_cast<int32_t*>(index.mutable_data_ptr());
  int32_t rank = 0;
  for (int64_t position = 0; position < call.mask.size(0); ++position) {
    numbers[position] = masked_at(call.mask, position) ? rank++ : ~rank;
  }
  return index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  const DeepstackArguments call(hidden_states, visual_pos_masks, visual_embeds, index);
  check_count(call.mask, call.visual);
  std::vector<const char*> copied(call.rows()), added(call.rows());
  for (int64_t row = 0, number = 0; row < call.rows(); ++row) {
    copied[row] = call.x.at(row);
    if (masked_at(call.mask, row)) added[row] = call.embeds.at(number++);
  }
  return written_rows(hidden_states.sizes(), hidden_states, call.hidden, copied.data(), added.data());
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  const PlaceArguments call(inputs_embeds, mask, image_embeds, index);
  check_count(call.mask, call.visual);
  std::vector<const char*> copied(call.rows());
  for (int64_t row = 0, number = 0; row < call.rows(); ++row) {
    copied[row] = masked_at(call.mask, row) ? call.embeds.at(number++) : call.x.at(row);
  }
  return written_rows(inputs_embeds.sizes(), inputs_embeds, call.hidden, copied.data());
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x, const Tensor& mask, int64_t rows,
                                      const std::optional<Tensor>& index, bool rest) {
  const SplitArguments call(x, mask, rows, index);
  check_count(call.mask, rows);
  std::vector<const char*> masked, others(call.rows());
  masked.reserve(rows);
  for (int64_t row = 0; row < call.rows(); ++row) {
    if (masked_at(call.mask, row)) {
      masked.push_back(call.x.at(row));
    } else {
      others[row] = call.x.at(row);
    }
  }
  Tensor taken = written_rows({rows, call.hidden}, x, call.hidden, masked.data());
  return {std::move(taken),
          rest ? written_rows(x.sizes(), x, call.hidden, others.data()) : allocate({int64_t{0}}, x, call.dtype)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens, const Tensor& invalid, int64_t keep,
                                                  const std::optional<Tensor>& order, bool pad_left) {
  const CompactArguments call(tokens, invalid, keep, order);
  Tensor kept_invalid = allocate({call.batch, keep}, tokens, Dtype::kBool);
  Tensor kept_order = allocate({call.batch, keep}, tokens, Dtype::kInt64);
  bool* const slot_invalid = static_cast<bool*>(kept_invalid.mutable_data_ptr());
  int64_t* const slot_token = static_cast<int64_t*>(kept_order.mutable_data_ptr());
  const int64_t slots = call.batch * keep;
  std::vector<const char*> sources(slots);
  const auto fill = [&](int64_t token, int64_t slot, bool masked) {
    slot_token[slot] = token % call.tokens;
    slot_invalid[slot] = masked;
    if (!masked) sources[slot] = call.x.at(token);
  };
  if (order.has_value()) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t position = *call.order.at<int64_t>(slot);
      check_within("order", position, 0, call.tokens - 1);
      const int64_t token = slot / keep * call.tokens + position;
      fill(token, slot, masked_at(call.invalid, token));
    }
  } else {
    each_kept(call.invalid, call.batch, call.tokens, keep, pad_left, fill);
  }
  Tensor packed = written_rows({call.batch, keep, call.hidden}, tokens, call.hidden, sources.data());
  return {std::move(packed), std::move(kept_invalid), std::move(kept_order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tokens, const Tensor& invalid, bool pad_left) {
  const CompactGradientArguments call(grad_tokens, invalid);
  std::vector<const char*> sources(call.batch * call.tokens);
  each_kept(call.invalid, call.batch, call.tokens, call.kept_count, pad_left,
            [&](int64_t token, int64_t slot, bool masked) {
    if (!masked) sources[token] = call.grad.at(slot);
  });
  return written_rows({call.batch, call.tokens, call.hidden}, grad_tokens, call.hidden, sources.data());
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
