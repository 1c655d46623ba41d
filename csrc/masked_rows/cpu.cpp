// The ops on masked rows on the CPU: arguments, outputs, threads, and the rows that are only moved.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/common.h"
#include "common/row_moves.h"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

// A (B, T) bool tensor, copied once where it is not contiguous: it is small beside the rows.
class Mask {
 public:
  Mask(const char* name, const Tensor& mask) : tensor_(mask) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(mask.get(), &dtype));
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_bool() && mask.dim() == 2, name, " must be bool of shape (B, T)");
    if (!mask.is_contiguous()) tensor_ = torch::stable::contiguous(mask);
    data_ = static_cast<const uint8_t*>(tensor_.const_data_ptr());
    batch_ = mask.size(0);
    tokens_ = mask.size(1);
  }

  // The mask of the rows of x.
  Mask(const char* name, const Tensor& mask, const char* x_name, const Tensor& x) : Mask(name, mask) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch() && x.size(1) == tokens(), name,
                    " must have the first two sizes of ", x_name, ", which must have shape (B, T, D)");
  }

  int64_t batch() const { return batch_; }
  int64_t tokens() const { return tokens_; }
  int64_t count() const { return batch_ * tokens_; }
  bool operator[](int64_t position) const { return data_[position] != 0; }

  int64_t count_true() const {
    int64_t found = 0;
    for (int64_t position = 0; position < count(); ++position) found += (*this)[position];
    return found;
  }

 private:
  Tensor tensor_;
  const uint8_t* data_;
  int64_t batch_, tokens_;
};

// Refuse a mask that is not true at as many positions as there are rows, and an index that cannot be the mask's. Its
// numbers are not read: on a CPU to count anew is cheaper.
void check_count(const char* name, const Mask& mask, int64_t rows, const std::optional<Tensor>& index) {
  const int64_t found = mask.count_true();
  STD_TORCH_CHECK(found == rows, name, " must be true at as many positions as there are rows, ", rows, ", got ", found);
  if (index.has_value()) {
    STD_TORCH_CHECK(index->dim() == 2 && index->size(0) == mask.batch() && index->size(1) == mask.tokens(),
                    "index must have the shape of ", name);
  }
}

Rows embeds_rows(const char* name, const Tensor& embeds, const Rows& x) {
  STD_TORCH_CHECK(embeds.dim() == 2 && embeds.size(1) == x.size, name, " must have shape (V, ", x.size, ")");
  STD_TORCH_CHECK(dtype_of(embeds) == dtype_of(x.tensor), name, " must have the dtype of the rows it goes to");
  return Rows(embeds);
}

// Where each row of a tensor begins.
class RowBytes {
 public:
  explicit RowBytes(const Rows& rows)
      : data_(static_cast<const char*>(rows.data())),
        stride_(rows.row_stride * static_cast<int64_t>(rows.tensor.element_size())) {}
  const char* operator[](int64_t row) const { return data_ + row * stride_; }

 private:
  const char* data_;
  int64_t stride_;
};

// function(token, slot, invalid) for each token that compact_tokens keeps: both are counted over the whole batch.
template <class Function>
void each_kept(const Mask& invalid, int64_t keep, bool pad_left, const Function& function) {
  const int64_t tokens = invalid.tokens();
  for (int64_t sequence = 0; sequence < invalid.batch(); ++sequence) {
    const int64_t begin = sequence * tokens, end = begin + tokens;
    int64_t valid = 0;
    for (int64_t token = begin; token < end; ++token) valid += !invalid[token];
    if (valid > keep) valid = keep;
    const int64_t first = sequence * keep, last = first + keep;
    int64_t valid_slot = pad_left ? last - valid : first, invalid_slot = pad_left ? first : first + valid;
    const int64_t valid_end = valid_slot + valid, invalid_end = invalid_slot + keep - valid;
    for (int64_t token = begin; token < end; ++token) {
      const bool masked = invalid[token];
      const int64_t slot = masked ? invalid_slot : valid_slot;
      if (slot < (masked ? invalid_end : valid_end)) function(token, slot, masked);
      invalid_slot += masked;
      valid_slot += !masked;
    }
  }
}

// ---- the ops ----

Tensor row_index(const Tensor& mask) {
  const Mask positions("mask", mask);
  STD_TORCH_CHECK(positions.count() <= std::numeric_limits<int32_t>::max(),
                  "mask must have fewer than 2**31 positions, got ", positions.count());
  Tensor index = allocate(mask.sizes().data(), 2, mask, aoti_torch_dtype_int32());
  int32_t* const numbers = static_cast<int32_t*>(index.mutable_data_ptr());
  int32_t rank = 0;
  for (int64_t position = 0; position < positions.count(); ++position) {
    const bool masked = positions[position];
    numbers[position] = masked ? rank : ~rank;
    rank += masked;
  }
  return index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  const Mask mask("visual_pos_masks", visual_pos_masks, "hidden_states", hidden_states);
  const Rows x(hidden_states), embeds = embeds_rows("visual_embeds", visual_embeds, x);
  check_count("visual_pos_masks", mask, embeds.count, index);
  const RowBytes hidden(x), visual(embeds);
  std::vector<const char*> copied(x.count), added(x.count);
  for (int64_t row = 0, number = 0; row < x.count; ++row) {
    copied[row] = hidden[row];
    added[row] = mask[row] ? visual[number] : nullptr;
    number += mask[row];
  }
  return written_rows(hidden_states.sizes().data(), 3, x.tensor, x.size, copied.data(), added.data());
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  const Mask positions("mask", mask, "inputs_embeds", inputs_embeds);
  const Rows x(inputs_embeds), embeds = embeds_rows("image_embeds", image_embeds, x);
  check_count("mask", positions, embeds.count, index);
  const RowBytes text(x), image(embeds);
  std::vector<const char*> copied(x.count);
  for (int64_t row = 0, number = 0; row < x.count; ++row) {
    copied[row] = positions[row] ? image[number] : text[row];
    number += positions[row];
  }
  return written_rows(inputs_embeds.sizes().data(), 3, x.tensor, x.size, copied.data());
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x, const Tensor& mask, int64_t rows,
                                      const std::optional<Tensor>& index, bool rest) {
  const Mask positions("mask", mask, "x", x);
  const Rows all(x);
  check_count("mask", positions, rows, index);
  const RowBytes from(all);
  std::vector<const char*> masked, others(all.count);
  masked.reserve(rows);
  for (int64_t row = 0; row < all.count; ++row) {
    if (positions[row]) {
      masked.push_back(from[row]);
    } else {
      others[row] = from[row];
    }
  }
  const int64_t taken_sizes[] = {rows, all.size}, nothing = 0;
  Tensor taken = written_rows(taken_sizes, 2, x, all.size, masked.data());
  return {std::move(taken),
          rest ? written_rows(x.sizes().data(), 3, x, all.size, others.data()) : allocate(&nothing, 1, x)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens, const Tensor& invalid, int64_t keep,
                                                  const std::optional<Tensor>& order, bool pad_left) {
  const Mask mask("invalid", invalid, "tokens", tokens);
  STD_TORCH_CHECK(0 <= keep && keep <= mask.tokens(), "keep must be within 0 and ", mask.tokens(), ", got ", keep);
  const Rows all(tokens);
  const int64_t sizes[] = {mask.batch(), keep, all.size};
  Tensor kept_invalid = allocate(sizes, 2, tokens, aoti_torch_dtype_bool());
  Tensor kept_order = allocate(sizes, 2, tokens, aoti_torch_dtype_int64());
  bool* const slot_invalid = static_cast<bool*>(kept_invalid.mutable_data_ptr());
  int64_t* const slot_token = static_cast<int64_t*>(kept_order.mutable_data_ptr());
  if (order.has_value()) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(order->get(), &dtype));
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_int64() && order->dim() == 2 && order->size(0) == mask.batch() &&
                        order->size(1) == keep,
                    "order must be int64 of shape (", mask.batch(), ", ", keep, ")");
    const Tensor given = torch::stable::contiguous(*order);
    const int64_t* const positions = static_cast<const int64_t*>(given.const_data_ptr());
    for (int64_t slot = 0; slot < mask.batch() * keep; ++slot) {
      STD_TORCH_CHECK(0 <= positions[slot] && positions[slot] < mask.tokens(), "order must be within 0 and ",
                      mask.tokens() - 1, ", got ", positions[slot]);
      slot_token[slot] = positions[slot];
      slot_invalid[slot] = mask[slot / keep * mask.tokens() + positions[slot]];
    }
  } else {
    each_kept(mask, keep, pad_left, [&](int64_t token, int64_t slot, bool masked) {
      slot_token[slot] = token % mask.tokens();
      slot_invalid[slot] = masked;
    });
  }
  const RowBytes from(all);
  std::vector<const char*> sources(mask.batch() * keep);
  for (int64_t sequence = 0, slot = 0; sequence < mask.batch(); ++sequence) {
    for (const int64_t end = slot + keep; slot < end; ++slot) {
      if (!slot_invalid[slot]) sources[slot] = from[sequence * mask.tokens() + slot_token[slot]];
    }
  }
  Tensor packed = written_rows(sizes, 3, tokens, all.size, sources.data());
  return {std::move(packed), std::move(kept_invalid), std::move(kept_order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tokens, const Tensor& invalid, bool pad_left) {
  const Mask mask("invalid", invalid);
  STD_TORCH_CHECK(grad_tokens.dim() == 3 && grad_tokens.size(0) == mask.batch() && grad_tokens.size(1) <= mask.tokens(),
                  "grad_tokens must have shape (", mask.batch(), ", keep, D) with keep <= ", mask.tokens());
  const Rows grads(grad_tokens);
  const RowBytes from(grads);
  std::vector<const char*> sources(mask.count());
  each_kept(mask, grad_tokens.size(1), pad_left, [&](int64_t token, int64_t slot, bool masked) {
    if (!masked) sources[token] = from[slot];
  });
  const int64_t sizes[] = {mask.batch(), mask.tokens(), grads.size};
  return written_rows(sizes, 3, grad_tokens, grads.size, sources.data());
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
