// Rows chosen by a mask, on CUDA: numbered, added to, replaced, taken out and packed.
// vlmfast/ops/masked_rows/definition.py defines what is computed.
//
// Each op is at most two launches: one numbers the masked positions, one moves rows, both bound by memory. With rows of
// 1 KiB and more the numbers are below one per cent of the bytes, so a large call should come within a tenth of a copy
// of as many. Neither launch waits for the other's numbers on the host, sums with atomics or has a shape that depends
// on data: results are the same in every run, and a CUDA graph may hold them.
#include <optional>
#include <tuple>
#include <utility>

#include "common/row_moves.cuh"
#include "masked_rows/mask_ranks.cuh"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

// ---- what is done with the numbers ----

struct WriteIndex {
  static constexpr bool kNeedsTotal = false;
  int32_t* index;  // (positions,), one sequence

  __device__ __forceinline__ void operator()(int64_t, int64_t position, bool masked, int rank, int) const {
    index[position] = masked ? rank : ~rank;
  }
};

// Which tokens of a sequence are kept, and where.
struct Packing {
  int64_t tokens, kept_count;
  bool pad_left;

  // Returns the place of a token among those that are kept, or -1.
  __device__ __forceinline__ int64_t place(int64_t position, bool invalid, int invalid_before,
                                           int invalid_total) const {
    const int64_t valid_kept = min(tokens - invalid_total, kept_count), invalid_kept = kept_count - valid_kept;
    const int64_t rank = invalid ? invalid_before : position - invalid_before;
    const int64_t kept = invalid ? invalid_kept : valid_kept;
    const int64_t first = invalid == pad_left ? 0 : kept_count - kept;
    return rank < kept ? first + rank : -1;
  }
};

struct WriteOrder {
  static constexpr bool kNeedsTotal = true;
  Packing packing;
  int64_t* order;  // (batch, kept_count)

  __device__ __forceinline__ void operator()(int64_t batch, int64_t position, bool invalid, int rank, int total) const {
    const int64_t place = packing.place(position, invalid, rank, total);
    if (place >= 0) order[batch * packing.kept_count + place] = position;
  }
};

struct WritePlaces {
  static constexpr bool kNeedsTotal = true;
  Packing packing;
  int64_t* places;  // (batch, tokens): the row of the packed tokens, or -1

  __device__ __forceinline__ void operator()(int64_t batch, int64_t position, bool invalid, int rank, int total) const {
    const int64_t place = invalid ? -1 : packing.place(position, invalid, rank, total);
    places[batch * packing.tokens + position] = place < 0 ? -1 : batch * packing.kept_count + place;
  }
};

// ---- which row goes where ----

// The result of row_index, and the number of masked rows that there must be.
struct RowNumbers {
  const int32_t* index;  // (positions,)
  int64_t positions, rows;

  // Returns the number of a masked row, and a negative one for others.
  __device__ __forceinline__ int operator[](int64_t position) const {
    const int number = index[position];
    const bool last = position == positions - 1;  // its entry tells how many there are
    VLMFAST_DEVICE_ASSERT(number < rows && !(last && (number < 0 ? ~number : number + 1) != rows),
                          "the mask must be true at as many positions as there are rows");
    return number;
  }
};

template <typename scalar_t>
struct AddRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kAdd;
  RowNumbers numbers;
  Input<scalar_t, 2> x, embeds;
  scalar_t* sums;
  int64_t hidden;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t row) const {
    const int number = numbers[row];
    return {x.at(row), sums + row * hidden, number < 0 ? nullptr : embeds.at(number)};
  }
};

struct PlaceRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowNumbers numbers;
  Input<Word, 2> x, embeds;
  Word* placed;
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int number = numbers[row];
    return {number < 0 ? x.at(row) : embeds.at(number), placed + row * hidden};
  }
};

struct SplitRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowNumbers numbers;
  Input<Word, 2> x;
  Word *taken, *rest;  // rest may be null
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int number = numbers[row];
    Word* const rest_row = rest == nullptr ? nullptr : rest + row * hidden;
    if (number >= 0) return {x.at(row), taken + number * hidden, nullptr, rest_row};
    return {x.at(row), rest_row};
  }
};

struct PackRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  Input<Word, 2> x;        // (batch, tokens, hidden)
  const uint8_t* invalid;  // (batch, tokens)
  const int64_t* order;    // (batch, kept_count)
  Word* packed;            // (batch, kept_count, hidden)
  uint8_t* packed_invalid;
  int64_t* packed_order;  // null where `order` is itself the result
  int64_t tokens, kept_count, hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int64_t position = order[row];
    VLMFAST_DEVICE_ASSERT(position >= 0 && position < tokens, "order must be within 0 and the tokens of a sequence");
    const int64_t source = row / kept_count * tokens + position;
    const uint8_t masked = invalid[source] != 0;
    if (threadIdx.x == 0) {
      packed_invalid[row] = masked;
      if (packed_order != nullptr) packed_order[row] = position;
    }
    return {masked ? nullptr : x.at(source), packed + row * hidden};
  }
};

struct UnpackRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  Input<Word, 2> grad;    // (batch * kept_count, hidden)
  const int64_t* places;  // (batch * tokens,)
  Word* unpacked;
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int64_t place = places[row];
    return {place < 0 ? nullptr : grad.at(place), unpacked + row * hidden};
  }
};

constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // positions of a mask: ranks are counted in 32 bits

// A (batch, tokens, hidden) tensor and the numbers of its masked rows.
class MaskedRows {
 public:
  Size batch{"batch"}, tokens{"tokens"}, hidden{"hidden"};
  FloatDtype dtype;
  View<2> x;

  MaskedRows(const char* name, const Tensor& tensor) : x(name, tensor, {{batch, tokens}, hidden}, dtype) {}

  // Numbers the masked rows, of which there must be `count`: by the index that is given, or by a new one.
  RowNumbers number(const DeviceScope& scope, const char* name, const Tensor& mask_tensor,
                    const std::optional<Tensor>& given, int64_t count) {
    const int64_t positions = batch * tokens;
    STD_TORCH_CHECK(positions > 0 || count == 0, "the mask must be true at as many positions as there are rows, ",
                    count);
    check_within("the positions of a mask", positions, 0, kMost);
    if (given) {
      index_view_ = View<1>("index", *given, {{batch, tokens}}, Dtype::kInt32);
      return {scope.input<int32_t>(index_view_).data, positions, count};
    }
    const View mask(name, mask_tensor, {{batch, tokens}}, Dtype::kBool);
    index_ = allocate({batch, tokens}, mask_tensor, Dtype::kInt32);
    int32_t* const numbers = scope.output<int32_t>(index_);
    if (positions > 0) launch_rank(scope, scope.input<uint8_t>(mask).data, 1, positions, WriteIndex{numbers});
    return {numbers, positions, count};
  }

 private:
  View<1> index_view_;
  Tensor index_;
};

Tensor row_index(const Tensor& mask_tensor) {
  Size batch("batch"), tokens("tokens");
  const View mask("mask", mask_tensor, {{batch, tokens}}, Dtype::kBool);
  check_within("the positions of mask", mask.size(0), 0, kMost);
  Tensor index = allocate({batch, tokens}, mask_tensor, Dtype::kInt32);
  if (mask.size(0) == 0) return index;
  const DeviceScope scope(mask_tensor);
  const WriteIndex write{scope.output<int32_t>(index)};
  launch_rank(scope, scope.input<uint8_t>(mask).data, 1, mask.size(0), write);
  return index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  MaskedRows rows("hidden_states", hidden_states);
  Size visual("visual");
  const View embeds("visual_embeds", visual_embeds, {visual, rows.hidden}, rows.dtype);
  Tensor sums = allocate_like(hidden_states);
  const DeviceScope scope(hidden_states);
  const RowNumbers numbers = rows.number(scope, "visual_pos_masks", visual_pos_masks, index, visual);
  with_dtype(rows.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const AddRows<scalar_t> move{numbers, scope.input<scalar_t>(rows.x), scope.input<scalar_t>(embeds),
                                 scope.output<scalar_t>(sums), rows.hidden};
    launch_move<scalar_t>(scope, rows.x.size(0), move, rows.x, embeds);
  });
  return sums;
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  MaskedRows rows("inputs_embeds", inputs_embeds);
  Size visual("visual");
  const View embeds("image_embeds", image_embeds, {visual, rows.hidden}, rows.dtype);
  Tensor placed = allocate_like(inputs_embeds);
  const DeviceScope scope(inputs_embeds);
  const RowNumbers numbers = rows.number(scope, "mask", mask, index, visual);
  const PlaceRows move{numbers, scope.input<Word>(rows.x), scope.input<Word>(embeds), scope.output<Word>(placed),
                       row_size<Word>(rows.x)};
  launch_move<Word>(scope, rows.x.size(0), move, rows.x, embeds);
  return placed;
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x_tensor, const Tensor& mask, int64_t count,
                                      const std::optional<Tensor>& index, bool with_rest) {
  MaskedRows rows("x", x_tensor);
  check_within("rows", count, 0, rows.x.size(0));
  Tensor taken = allocate({count, rows.hidden}, x_tensor, rows.dtype);
  Tensor rest = with_rest ? allocate_like(x_tensor) : allocate({0}, x_tensor, rows.dtype);
  const DeviceScope scope(x_tensor);
  const RowNumbers numbers = rows.number(scope, "mask", mask, index, count);
  const SplitRows move{numbers, scope.input<Word>(rows.x), scope.output<Word>(taken),
                       with_rest ? scope.output<Word>(rest) : nullptr, row_size<Word>(rows.x)};
  launch_move<Word>(scope, rows.x.size(0), move, rows.x);
  return {std::move(taken), std::move(rest)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens_tensor, const Tensor& invalid_tensor,
                                                  int64_t keep, const std::optional<Tensor>& given_order,
                                                  bool pad_left) {
  Size batch("batch"), tokens = Size("tokens").at_most(kMost), hidden("hidden"), kept_count("keep", keep);
  FloatDtype dtype;
  const View x("tokens", tokens_tensor, {{batch, tokens}, hidden}, dtype);
  const View invalid("invalid", invalid_tensor, {{batch, tokens}}, Dtype::kBool);
  const View given("order", given_order, {{batch, kept_count}}, Dtype::kInt64);
  check_within("keep", keep, 0, tokens);
  Tensor packed = allocate({batch, keep, hidden}, tokens_tensor, dtype);
  Tensor packed_invalid = allocate({batch, keep}, tokens_tensor, Dtype::kBool);
  Tensor order = allocate({batch, keep}, tokens_tensor, Dtype::kInt64);
  const DeviceScope scope(tokens_tensor);
  const uint8_t* const mask = scope.input<uint8_t>(invalid).data;
  int64_t* const order_data = scope.output<int64_t>(order);
  PackRows move{scope.input<Word>(x),
                mask,
                order_data,
                scope.output<Word>(packed),
                scope.output<uint8_t>(packed_invalid),
                nullptr,
                tokens,
                keep,
                row_size<Word>(x)};
  if (given_order) {
    move.order = scope.input<int64_t>(given).data;
    move.packed_order = order_data;
  } else if (batch * keep > 0) {
    launch_rank(scope, mask, batch, tokens, WriteOrder{{tokens, keep, pad_left}, order_data});
  }
  launch_move<Word>(scope, batch * keep, move, x);
  return {std::move(packed), std::move(packed_invalid), std::move(order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tensor, const Tensor& invalid_tensor, bool pad_left) {
  Size batch("batch"), tokens = Size("tokens").at_most(kMost), hidden("hidden");
  FloatDtype dtype;
  const View invalid("invalid", invalid_tensor, {{batch, tokens}}, Dtype::kBool);
  Size kept_count = Size("keep").at_most(tokens);
  const View grad("grad_tokens", grad_tensor, {{batch, kept_count}, hidden}, dtype);
  Tensor unpacked = allocate({batch, tokens, hidden}, grad_tensor, dtype);
  if (batch * tokens == 0) return unpacked;
  Tensor places = allocate({batch, tokens}, grad_tensor, Dtype::kInt64);
  const DeviceScope scope(grad_tensor);
  int64_t* const places_data = scope.output<int64_t>(places);
  const WritePlaces write{{tokens, kept_count, pad_left}, places_data};
  launch_rank(scope, scope.input<uint8_t>(invalid).data, batch, tokens, write);
  const UnpackRows move{scope.input<Word>(grad), places_data, scope.output<Word>(unpacked), row_size<Word>(grad)};
  launch_move<Word>(scope, batch * tokens, move, grad);
  return unpacked;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
