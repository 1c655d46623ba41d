// Rows chosen by a mask, on CUDA: numbered, added to, replaced, taken out and packed. vlmfast/ops/masked_rows.py
// defines what is computed.
//
// Each op is at most two launches: one numbers the masked positions, one moves rows. Both are bound by memory. For N =
// B T rows of D elements of s bytes, V of them masked, and K = B keep rows of which K' are valid, the second one moves
//   deepstack_add             (2 N + V) D s   the hidden states and the embeddings in, the sums out
//   place_embeddings          2 N D s         masked rows of the input are not read
//   split_rows                (2 N + V) D s   x in once, both results out; 2 V D s without the rest
//   compact_tokens            (K + K') D s    only rows that are kept and valid are read
//   compact_tokens_backward   (N + K') D s
// and 4 to 17 bytes a row of numbers. The first one reads N bytes and writes 4 N (8 K, 8 N for the last two), and what
// each block counts of the mask before its own part comes from the L2 cache. With rows of 1 KiB and more that is below
// one per cent, so a large call should come within a tenth of a copy of as many bytes. Neither launch waits for the
// other's numbers on the host, sums with atomics or has a shape that depends on data: results are the same in every
// run, and a CUDA graph may hold them.
#include <optional>
#include <tuple>
#include <utility>

#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "common/row_moves.cuh"
#include "common/row_ranks.cuh"
#include "masked_rows/ops.h"

namespace vlmfast {
namespace {

// ---- what is done with the numbers ----

struct WriteIndex {
  static constexpr bool kNeedsTotal = false;
  int32_t* index;  // (positions,), one sample

  __device__ __forceinline__ void operator()(int64_t, int64_t position, bool masked, int rank, int) const {
    index[position] = masked ? rank : ~rank;
  }
};

// Which tokens of a sample are kept, and where.
struct Packing {
  int64_t tokens, keep;
  bool pad_left;

  // The place of a token among those that are kept, or -1.
  __device__ __forceinline__ int64_t place(int64_t position, bool invalid, int invalid_before,
                                           int invalid_total) const {
    const int64_t valid_kept = min(tokens - invalid_total, keep), invalid_kept = keep - valid_kept;
    const int64_t rank = invalid ? invalid_before : position - invalid_before;
    const int64_t kept = invalid ? invalid_kept : valid_kept;
    const int64_t first = invalid == pad_left ? 0 : keep - kept;
    return rank < kept ? first + rank : -1;
  }
};

struct WriteOrder {
  static constexpr bool kNeedsTotal = true;
  Packing packing;
  int64_t* order;  // (samples, keep)

  __device__ __forceinline__ void operator()(int64_t sample, int64_t position, bool invalid, int rank,
                                             int total) const {
    const int64_t place = packing.place(position, invalid, rank, total);
    if (place >= 0) order[sample * packing.keep + place] = position;
  }
};

struct WritePlaces {
  static constexpr bool kNeedsTotal = true;
  Packing packing;
  int64_t* places;  // (samples, tokens): the row of the packed tokens, or -1

  __device__ __forceinline__ void operator()(int64_t sample, int64_t position, bool invalid, int rank,
                                             int total) const {
    const int64_t place = invalid ? -1 : packing.place(position, invalid, rank, total);
    places[sample * packing.tokens + position] = place < 0 ? -1 : sample * packing.keep + place;
  }
};

// ---- which row goes where ----

// What row_index gives, and the number of masked rows that there must be.
struct RowNumbers {
  const int32_t* index;  // (positions,)
  int64_t positions, rows;

  // The number of a masked row; negative for another one.
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
  RowPointer<scalar_t> x, embeds;
  scalar_t* sums;
  int64_t hidden;

  __device__ __forceinline__ Route<scalar_t> operator()(int64_t row) const {
    const int number = numbers[row];
    return {x[row], sums + row * hidden, number < 0 ? nullptr : embeds[number]};
  }
};

struct PlaceRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowNumbers numbers;
  RowPointer<Word> x, embeds;
  Word* placed;
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int number = numbers[row];
    return {number < 0 ? x[row] : embeds[number], placed + row * hidden};
  }
};

struct SplitRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowNumbers numbers;
  RowPointer<Word> x;
  Word *taken, *rest;  // rest may be null
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int number = numbers[row];
    Word* const rest_row = rest == nullptr ? nullptr : rest + row * hidden;
    if (number >= 0) return {x[row], taken + number * hidden, nullptr, rest_row};
    return {x[row], rest_row};
  }
};

struct PackRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowPointer<Word> x;      // (samples, tokens, hidden)
  const uint8_t* invalid;  // (samples, tokens)
  const int64_t* order;    // (samples, keep)
  Word* packed;            // (samples, keep, hidden)
  uint8_t* packed_invalid;
  int64_t* packed_order;  // null where `order` is itself the result
  int64_t tokens, keep, hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int64_t position = order[row];
    VLMFAST_DEVICE_ASSERT(position >= 0 && position < tokens, "order must be within 0 and the tokens of a sequence");
    const int64_t source = row / keep * tokens + position;
    const uint8_t masked = invalid[source] != 0;
    if (threadIdx.x == 0) {
      packed_invalid[row] = masked;
      if (packed_order != nullptr) packed_order[row] = position;
    }
    return {masked ? nullptr : x[source], packed + row * hidden};
  }
};

struct UnpackRows {
  static constexpr Arithmetic kArithmetic = Arithmetic::kNone;
  RowPointer<Word> grad;  // (samples * keep, hidden)
  const int64_t* places;  // (samples * tokens,)
  Word* unpacked;
  int64_t hidden;

  __device__ __forceinline__ Route<Word> operator()(int64_t row) const {
    const int64_t place = places[row];
    return {place < 0 ? nullptr : grad[place], unpacked + row * hidden};
  }
};

// ---- launchers ----

// A mask, an index or an order as one row, without gaps.
Rows flat(const char* name, const Tensor& tensor, int32_t dtype, int64_t samples, int64_t tokens) {
  int32_t found;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &found));
  STD_TORCH_CHECK(found == dtype, name, " is of the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.sizes()[0] == samples && tensor.sizes()[1] == tokens, name,
                  " must have shape (", samples, ", ", tokens, ")");
  Rows row(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  row.size = row.row_stride = samples * tokens;
  row.count = 1;
  return row;
}

void check_positions(int64_t positions) {  // ranks are counted in 32 bits
  STD_TORCH_CHECK(positions < int64_t{1} << 31, "a mask must have fewer than 2^31 positions, got ", positions);
}

Rows token_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3, "the tokens must have shape (B, T, D), got ", tensor.dim(), " dimensions");
  return Rows(tensor);
}

Rows embedding_rows(const Tensor& tensor, const Rows& x) {
  const Rows rows(tensor);
  STD_TORCH_CHECK(tensor.dim() == 2 && rows.size == x.size, "the embeddings must have shape (V, ", x.size, ")");
  STD_TORCH_CHECK(dtype_of(tensor) == dtype_of(x.tensor), "the embeddings must have the dtype of the tokens");
  return rows;
}

int64_t words_of(const Rows& rows) { return count_in<Word>(rows.tensor, rows.size); }

// The tensor owns what the numbers point to.
struct NumberedRows {
  Tensor index;
  RowNumbers numbers;
};

NumberedRows number_rows(const DeviceScope& scope, const Rows& mask, int64_t rows) {
  check_positions(mask.size);
  Tensor index = allocate(mask.tensor.sizes().data(), 2, mask.tensor, aoti_torch_dtype_int32());
  int32_t* const data = scope.output<int32_t>(index);
  if (mask.size > 0) launch_rank(scope, scope.input<uint8_t>(mask).data, 1, mask.size, WriteIndex{data});
  return {std::move(index), {data, mask.size, rows}};
}

// Of the rows of a (B, T, D) tensor, `rows` masked ones: by the index that is given, or by a new one.
NumberedRows number_rows(const DeviceScope& scope, const Tensor& x, const Tensor& mask,
                         const std::optional<Tensor>& given, int64_t rows) {
  const int64_t samples = x.sizes()[0], tokens = x.sizes()[1], positions = samples * tokens;
  STD_TORCH_CHECK(positions > 0 || rows == 0, "the mask must be true at as many positions as there are rows, ", rows);
  if (!given) return number_rows(scope, flat("mask", mask, aoti_torch_dtype_bool(), samples, tokens), rows);
  const Rows index = flat("index", *given, aoti_torch_dtype_int32(), samples, tokens);
  return {index.tensor, {scope.input<int32_t>(index).data, positions, rows}};
}

Tensor row_index(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2, "mask must have two dimensions, got ", mask.dim());
  const DeviceScope scope(mask);
  return number_rows(scope, flat("mask", mask, aoti_torch_dtype_bool(), mask.sizes()[0], mask.sizes()[1]), 0).index;
}

Tensor deepstack_add(const Tensor& hidden_states, const Tensor& visual_pos_masks, const Tensor& visual_embeds,
                     const std::optional<Tensor>& index) {
  const Rows x = token_rows(hidden_states), embeds = embedding_rows(visual_embeds, x);
  Tensor sums = allocate_like(hidden_states);
  const DeviceScope scope(hidden_states);
  const NumberedRows numbered = number_rows(scope, hidden_states, visual_pos_masks, index, embeds.count);
  with_dtype(dtype_of(hidden_states), [&](auto zero) {
    using scalar_t = decltype(zero);
    const AddRows<scalar_t> move{numbered.numbers, scope.input<scalar_t>(x), scope.input<scalar_t>(embeds),
                                 scope.output<scalar_t>(sums), x.size};
    launch_move(scope, x.count, x.size, {move.x, move.embeds}, move);
  });
  return sums;
}

Tensor place_embeddings(const Tensor& inputs_embeds, const Tensor& mask, const Tensor& image_embeds,
                        const std::optional<Tensor>& index) {
  const Rows x = token_rows(inputs_embeds), embeds = embedding_rows(image_embeds, x);
  Tensor placed = allocate_like(inputs_embeds);
  const DeviceScope scope(inputs_embeds);
  const NumberedRows numbered = number_rows(scope, inputs_embeds, mask, index, embeds.count);
  const PlaceRows move{numbered.numbers, scope.input<Word>(x), scope.input<Word>(embeds), scope.output<Word>(placed),
                       words_of(x)};
  launch_move(scope, x.count, move.hidden, {move.x, move.embeds}, move);
  return placed;
}

std::tuple<Tensor, Tensor> split_rows(const Tensor& x_tensor, const Tensor& mask, int64_t rows,
                                      const std::optional<Tensor>& index, bool with_rest) {
  const Rows x = token_rows(x_tensor);
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  const int64_t taken_sizes[] = {rows, x.size}, no_rest = 0;
  Tensor taken = allocate(taken_sizes, 2, x_tensor);
  Tensor rest = with_rest ? allocate_like(x_tensor) : allocate(&no_rest, 1, x_tensor);
  const DeviceScope scope(x_tensor);
  const NumberedRows numbered = number_rows(scope, x_tensor, mask, index, rows);
  const SplitRows move{numbered.numbers, scope.input<Word>(x), scope.output<Word>(taken),
                       with_rest ? scope.output<Word>(rest) : nullptr, words_of(x)};
  launch_move(scope, x.count, move.hidden, {move.x}, move);
  return {std::move(taken), std::move(rest)};
}

std::tuple<Tensor, Tensor, Tensor> compact_tokens(const Tensor& tokens_tensor, const Tensor& invalid, int64_t keep,
                                                  const std::optional<Tensor>& given_order, bool pad_left) {
  const Rows x = token_rows(tokens_tensor);
  const int64_t samples = tokens_tensor.sizes()[0], tokens = tokens_tensor.sizes()[1];
  const Rows mask = flat("invalid", invalid, aoti_torch_dtype_bool(), samples, tokens);
  STD_TORCH_CHECK(keep >= 0 && keep <= tokens, "keep must be within 0 and ", tokens, ", got ", keep);
  check_positions(tokens);
  const int64_t sizes[] = {samples, keep, x.size};
  Tensor packed = allocate(sizes, 3, tokens_tensor), packed_invalid = allocate(sizes, 2, invalid);
  Tensor order = allocate(sizes, 2, tokens_tensor, aoti_torch_dtype_int64());
  const DeviceScope scope(tokens_tensor);
  const uint8_t* const mask_data = scope.input<uint8_t>(mask).data;
  int64_t* const order_data = scope.output<int64_t>(order);
  PackRows move{scope.input<Word>(x),
                mask_data,
                order_data,
                scope.output<Word>(packed),
                scope.output<uint8_t>(packed_invalid),
                nullptr,
                tokens,
                keep,
                words_of(x)};
  std::optional<Rows> given;
  if (given_order) {
    given.emplace(flat("order", *given_order, aoti_torch_dtype_int64(), samples, keep));
    move.order = scope.input<int64_t>(*given).data;
    move.packed_order = order_data;
  } else if (samples * keep > 0) {
    launch_rank(scope, mask_data, samples, tokens, WriteOrder{{tokens, keep, pad_left}, order_data});
  }
  launch_move(scope, samples * keep, move.hidden, {move.x}, move);
  return {std::move(packed), std::move(packed_invalid), std::move(order)};
}

Tensor compact_tokens_backward(const Tensor& grad_tokens, const Tensor& invalid, bool pad_left) {
  const Rows grad = token_rows(grad_tokens);
  const int64_t samples = grad_tokens.sizes()[0], keep = grad_tokens.sizes()[1];
  STD_TORCH_CHECK(invalid.dim() == 2, "invalid must have two dimensions, got ", invalid.dim());
  const int64_t tokens = invalid.sizes()[1];
  const Rows mask = flat("invalid", invalid, aoti_torch_dtype_bool(), samples, tokens);
  STD_TORCH_CHECK(keep <= tokens, "grad_tokens must have at most ", tokens, " tokens, got ", keep);
  check_positions(tokens);
  const int64_t sizes[] = {samples, tokens, grad.size};
  Tensor unpacked = allocate(sizes, 3, grad_tokens);
  Tensor places = allocate(sizes, 2, grad_tokens, aoti_torch_dtype_int64());
  if (samples * tokens == 0) return unpacked;
  const DeviceScope scope(grad_tokens);
  int64_t* const places_data = scope.output<int64_t>(places);
  launch_rank(scope, scope.input<uint8_t>(mask).data, samples, tokens,
              WritePlaces{{tokens, keep, pad_left}, places_data});
  const UnpackRows move{scope.input<Word>(grad), places_data, scope.output<Word>(unpacked), words_of(grad)};
  launch_move(scope, samples * tokens, move.hidden, {move.grad}, move);
  return unpacked;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
