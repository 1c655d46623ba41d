// The ops on rows chosen by a mask, on CUDA: the rows are numbered, added to, replaced, extracted and packed.
// vlmfast/ops/masked_rows/definition.py defines what is computed.
//
// Each op has at most two launches, both bound by memory: one numbers the masked positions, the other moves rows. For
// rows of at least 1 KiB the numbers are less than 1 % of the bytes, so a large call should take at most a tenth longer
// than a copy of the same bytes. There is no synchronisation with the host, no floating-point atomic and no
// data-dependent shape: results are deterministic, and the ops can be captured in a CUDA graph.
#include <optional>
#include <tuple>
#include <utility>

#include "common/row_moves.cuh"
#include "masked_rows/mask_ranks.cuh"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

// ---- what rank_kernel writes for each position ----

struct WriteIndex {
  static constexpr bool kNeedsTotal = false;
  int32_t* index;  // (positions,), ranked as one sequence

  __device__ __forceinline__ void operator()(int64_t, int64_t position, bool masked, int rank, int) const {
    index[position] = masked ? rank : ~rank;
  }
};

// Which tokens of a sequence are kept, and where.
struct Packing {
  int64_t tokens, kept_count;
  bool pad_left;

  // Returns the index of a token among the kept ones, or -1 if it is dropped.
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

// The result of row_index, and the number of masked rows that it must have.
struct RowNumbers {
  const int32_t* index;  // (positions,)
  int64_t positions, rows;

  // Returns the number of a masked row, and a negative number for other rows.
  __device__ __forceinline__ int operator[](int64_t position) const {
    const int number = index[position];
    const bool last = position == positions - 1;  // its entry gives the number of masked rows
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

// ---- launches ----

// The numbers of the `count` masked rows of a call: the given index, or a new one.
class NumberedRows {
 public:
  NumberedRows(const DeviceScope& scope, const MaskedRowsArguments& args, const Tensor& like, int64_t count)
      : numbers{scope.input<int32_t>(args.index).data, args.rows(), count} {
    STD_TORCH_CHECK(args.rows() > 0 || count == 0, "the mask must be true at as many positions as there are rows, ",
                    count);
    if (args.index || args.rows() == 0) return;
    index_ = allocate({args.rows()}, like, Dtype::kInt32);
    const WriteIndex write{scope.output<int32_t>(index_)};
    launch_rank(scope, scope.input<uint8_t>(args.mask).data, 1, args.rows(), write);
    numbers.index = write.index;
  }

  RowNumbers numbers;

 private:
  Tensor index_;
};

Tensor row_index(const Tensor& mask_tensor) {
  const MaskArguments args(mask_tensor);
  Tensor index = allocate({args.batch, args.tokens}, mask_tensor, Dtype::kInt32);
  if (args.mask.size(0) == 0) return index;
  const DeviceScope scope(mask_tensor);
  const WriteIndex write{scope.output<int32_t>(index)};
  launch_rank(scope, scope.input<uint8_t>(args.mask).data, 1, args.mask.size(0), write);
  return index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  const DeepstackArguments args(hidden_states, visual_pos_masks, visual_embeds, index);
  Tensor sums = allocate_like(hidden_states);
  const DeviceScope scope(hidden_states);
  const NumberedRows numbered(scope, args, hidden_states, args.visual);
  with_dtype(args.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const AddRows<scalar_t> move{numbered.numbers, scope.input<scalar_t>(args.x), scope.input<scalar_t>(args.embeds),
                                 scope.output<scalar_t>(sums), args.hidden};
    launch_move<scalar_t>(scope, args.rows(), move, args.x, args.embeds);
  });
  return sums;
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  const PlaceArguments args(inputs_embeds, mask, image_embeds, index);
  Tensor placed = allocate_like(inputs_embeds);
  const DeviceScope scope(inputs_embeds);
  const NumberedRows numbered(scope, args, inputs_embeds, args.visual);
  const PlaceRows move{numbered.numbers, scope.input<Word>(args.x), scope.input<Word>(args.embeds),
                       scope.output<Word>(placed), row_size<Word>(args.x)};
  launch_move<Word>(scope, args.rows(), move, args.x, args.embeds);
  return placed;
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x, const Tensor& mask, int64_t count,
                                      const std::optional<Tensor>& index, bool with_rest) {
  const SplitArguments args(x, mask, count, index);
  Tensor taken = allocate({count, args.hidden}, x, args.dtype);
  Tensor rest = with_rest ? allocate_like(x) : allocate({0}, x, args.dtype);
  const DeviceScope scope(x);
  const NumberedRows numbered(scope, args, x, count);
  const SplitRows move{numbered.numbers, scope.input<Word>(args.x), scope.output<Word>(taken),
                       with_rest ? scope.output<Word>(rest) : nullptr, row_size<Word>(args.x)};
  launch_move<Word>(scope, args.rows(), move, args.x);
  return {std::move(taken), std::move(rest)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens_tensor, const Tensor& invalid_tensor,
                                                  int64_t keep, const std::optional<Tensor>& given_order,
                                                  bool pad_left) {
  const CompactArguments args(tokens_tensor, invalid_tensor, keep, given_order);
  Tensor packed = allocate({args.batch, keep, args.hidden}, tokens_tensor, args.dtype);
  Tensor packed_invalid = allocate({args.batch, keep}, tokens_tensor, Dtype::kBool);
  Tensor order = allocate({args.batch, keep}, tokens_tensor, Dtype::kInt64);
  const DeviceScope scope(tokens_tensor);
  const uint8_t* const mask = scope.input<uint8_t>(args.invalid).data;
  int64_t* const order_data = scope.output<int64_t>(order);
  PackRows move{scope.input<Word>(args.x),
                mask,
                order_data,
                scope.output<Word>(packed),
                scope.output<uint8_t>(packed_invalid),
                nullptr,
                args.tokens,
                keep,
                row_size<Word>(args.x)};
  if (given_order) {
    move.order = scope.input<int64_t>(args.order).data;
    move.packed_order = order_data;
  } else if (args.batch * keep > 0) {
    launch_rank(scope, mask, args.batch, args.tokens, WriteOrder{{args.tokens, keep, pad_left}, order_data});
  }
  launch_move<Word>(scope, args.batch * keep, move, args.x);
  return {std::move(packed), std::move(packed_invalid), std::move(order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tensor, const Tensor& invalid_tensor, bool pad_left) {
  const CompactGradientArguments args(grad_tensor, invalid_tensor);
  Tensor unpacked = allocate({args.batch, args.tokens, args.hidden}, grad_tensor, args.dtype);
  if (args.batch * args.tokens == 0) return unpacked;
  Tensor places = allocate({args.batch, args.tokens}, grad_tensor, Dtype::kInt64);
  const DeviceScope scope(grad_tensor);
  int64_t* const places_data = scope.output<int64_t>(places);
  const WritePlaces write{{args.tokens, args.kept_count, pad_left}, places_data};
  launch_rank(scope, scope.input<uint8_t>(args.invalid).data, args.batch, args.tokens, write);
  const UnpackRows move{scope.input<Word>(args.grad), places_data, scope.output<Word>(unpacked),
                        row_size<Word>(args.grad)};
  launch_move<Word>(scope, args.batch * args.tokens, move, args.grad);
  return unpacked;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
