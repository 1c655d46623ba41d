// The choice and the merging of tokens on the CPU: arguments, outputs, threads, and which row goes where. The
// arithmetic is in token_merge_kernels.cpp.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/common.h"
#include "common/row_moves.h"
#include "token_merge/cpu_kernels.h"
#include "token_merge/ops.h"

namespace vlmfast {
namespace {

const TokenMergeKernels& kernels() {
  static const TokenMergeKernels table = at_cpu_level([](auto level) { return token_merge_kernels<level>(); });
  return table;
}

// A small (B, N) tensor of integers, copied once where it is not contiguous.
template <class T>
class Matrix {
 public:
  Matrix(const char* name, const Tensor& from, int64_t batch) : tensor_(from) {
    constexpr bool kLong = sizeof(T) == sizeof(int64_t);
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(from.get(), &dtype));
    STD_TORCH_CHECK(dtype == (kLong ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32()), name, " must be ",
                    kLong ? "int64" : "int32");
    STD_TORCH_CHECK(from.dim() == 2 && from.size(0) == batch, name, " must have two sizes, the first ", batch);
    if (!from.is_contiguous()) tensor_ = torch::stable::contiguous(from);
    data_ = static_cast<const T*>(tensor_.const_data_ptr());
  }

  int64_t columns() const { return tensor_.size(1); }
  const T* row(int64_t number) const { return data_ + number * columns(); }

 private:
  Tensor tensor_;
  const T* data_;
};

Matrix<int64_t> kept_of(const Tensor& tensor, const Sequences& rows) {
  const Matrix<int64_t> kept("kept", tensor, rows.batch());
  for (int64_t image = 0; image < rows.batch(); ++image) {
    int64_t before = -1;
    for (int64_t i = 0; i < kept.columns(); before = kept.row(image)[i++]) {
      STD_TORCH_CHECK(before < kept.row(image)[i] && kept.row(image)[i] < rows.rows(),
                      "kept must be ascending within 0 and ", rows.rows() - 1, " in each row");
    }
  }
  return kept;
}

void check_contextual(int64_t contextual, int64_t most) {
  STD_TORCH_CHECK(0 <= contextual && contextual <= most, "contextual must be within 0 and ", most, ", got ",
                  contextual);
}

// How many tokens were merged into each contextual one, of all images.
std::vector<int64_t> counts_of(const Matrix<int32_t>& slots, int64_t batch, int64_t contextual) {
  std::vector<int64_t> counts(batch * contextual);
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t token = 0; token < slots.columns(); ++token) {
      const int64_t slot = slots.row(image)[token];
      if (slot >= contextual && slot < 2 * contextual) ++counts[image * contextual + slot - contextual];
    }
  }
  return counts;
}

// ---- the ops ----

Tensor top_tokens(const Tensor& scores, int64_t k) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must have shape (B, N), got ", scores.dim(), " dimensions");
  const int64_t batch = scores.size(0), tokens = scores.size(1);
  STD_TORCH_CHECK(0 <= k && k <= tokens, "k must be within 0 and ", tokens, ", got ", k);
  const Rows rows(scores);
  const Dtype dtype = dtype_of(scores);
  const int64_t sizes[] = {batch, k}, row_bytes = rows.row_stride * static_cast<int64_t>(scores.element_size());
  Tensor kept = allocate(sizes, 2, scores, aoti_torch_dtype_int64());
  int64_t* const positions = static_cast<int64_t*>(kept.mutable_data_ptr());
  const char* const from = static_cast<const char*>(rows.data());
  std::vector<uint8_t> valid(batch);
  parallel_rows(batch, row_ranges(batch, tokens), [&](int64_t begin, int64_t end, int64_t) {
    std::vector<uint32_t> keys(tokens), sorted(tokens);
    for (int64_t row = begin; row < end; ++row) {
      valid[row] = kernels().order(dtype, from + row * row_bytes, tokens, keys.data());
      if (k == 0 || !valid[row]) continue;
      std::copy(keys.begin(), keys.end(), sorted.begin());
      std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
      const uint32_t least = sorted[k - 1];
      // Of those that have the least score of all kept, the first ones.
      int64_t equal = k - std::count_if(sorted.begin(), sorted.begin() + k, [&](uint32_t key) { return key > least; });
      int64_t* to = positions + row * k;
      for (int64_t token = 0; token < tokens; ++token) {
        if (keys[token] > least || (keys[token] == least && equal-- > 0)) *to++ = token;
      }
    }
  });
  STD_TORCH_CHECK(std::find(valid.begin(), valid.end(), 0) == valid.end(), "scores must not be NaN");
  return kept;
}

Tensor merge_slots(const Tensor& metric, const Tensor& kept, int64_t contextual) {
  const Sequences rows("metric", metric);
  const Matrix<int64_t> chosen = kept_of(kept, rows);
  const int64_t batch = rows.batch(), tokens = rows.rows(), k = chosen.columns(), left = tokens - k;
  check_contextual(contextual, left);
  const int64_t sizes[] = {batch, tokens}, joining = left - contextual;
  Tensor slots = allocate(sizes, 2, metric, aoti_torch_dtype_int32());
  int32_t* const numbers = static_cast<int32_t*>(slots.mutable_data_ptr());
  const int64_t step = contextual > 0 ? left / contextual : 1;
  std::vector<const char*> targets, joins;
  std::vector<int64_t> positions;
  targets.reserve(batch * contextual);
  joins.reserve(contextual > 0 ? batch * joining : 0);
  positions.reserve(joins.capacity());
  for (int64_t image = 0; image < batch; ++image) {
    int64_t rank = 0, other = 0;
    for (int64_t token = 0; token < tokens; ++token) {
      int32_t& slot = numbers[image * tokens + token];
      if (rank < k && chosen.row(image)[rank] == token) {
        slot = static_cast<int32_t>(rank++ - k);
      } else if (contextual == 0) {
        slot = static_cast<int32_t>(-k - 1);
      } else if (other % step == 0 && other / step < contextual) {
        slot = static_cast<int32_t>(other++ / step);
        targets.push_back(rows.at(image, token));
      } else {
        ++other;
        joins.push_back(rows.at(image, token));
        positions.push_back(image * tokens + token);
      }
    }
  }
  if (joins.empty()) return slots;
  const int64_t count = static_cast<int64_t>(joins.size()), size = rows.size();
  const std::unique_ptr<double[]> panels(new double[batch * kernels().packed_targets(contextual, size)]);
  const MergeSlots args{dtype_of(metric), size,         contextual, joining, targets.data(), joins.data(),
                        positions.data(), panels.get(), numbers};
  kernels().pack_targets(args, batch);
  parallel_rows(count, row_ranges(count, contextual * size), [&](int64_t begin, int64_t end, int64_t) {
    const std::unique_ptr<double[]> room(new double[kMergeRoom * size]);
    kernels().assign(args, begin, end, room.get());
  });
  return slots;
}

Tensor merge_rows(const Tensor& hidden, const Tensor& kept, const Tensor& slots, int64_t contextual, Merge merge) {
  const Sequences rows("hidden", hidden);
  const Matrix<int64_t> chosen = kept_of(kept, rows);
  const int64_t batch = rows.batch(), tokens = rows.rows(), k = chosen.columns(), size = rows.size();
  const Matrix<int32_t> numbers("slots", slots, batch);
  STD_TORCH_CHECK(numbers.columns() == tokens, "slots must have the first two sizes of hidden");
  check_contextual(contextual, tokens - k);
  const int64_t image_rows = k + contextual, sizes[] = {batch, image_rows, size};
  Tensor y = allocate_output(sizes, 3, hidden);
  if (y.numel() == 0) return y;

  // Where the row of each token goes: behind those of the same contextual token that are there already.
  const std::vector<int64_t> counts = counts_of(numbers, batch, contextual);
  std::vector<const char*> first(batch * image_rows);
  std::vector<int64_t> ends(batch * image_rows);
  int64_t joined = 0;
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t row = image * image_rows;
    for (int64_t i = 0; i < k; ++i) {
      first[row + i] = rows.at(image, chosen.row(image)[i]);
      ends[row + i] = joined;
    }
    for (int64_t c = 0; c < contextual; ++c) {
      first[row + k + c] = rows.at(image, 0);  // for slots that have no target
      ends[row + k + c] = joined;              // advanced below
      joined += counts[image * contextual + c];
    }
  }
  std::vector<const char*> joins(joined);
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t row = image * image_rows + k;
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t slot = numbers.row(image)[token];
      if (slot >= 0 && slot < contextual) first[row + slot] = rows.at(image, token);
      if (slot >= contextual && slot < 2 * contextual) joins[ends[row + slot - contextual]++] = rows.at(image, token);
    }
  }
  const MergedRows args{dtype_of(hidden), merge,       size,         batch * image_rows,
                        first.data(),     ends.data(), joins.data(), static_cast<char*>(y.mutable_data_ptr())};
  // Each thread has some columns of all rows: the rows differ in their work.
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  parallel_rows(blocks, row_ranges(blocks, kBlock * (args.rows + joined)), [&](int64_t begin, int64_t end, int64_t) {
    kernels().merge(args, begin * kBlock, std::min(end * kBlock, size));
  });
  return y;
}

Tensor merge_rows_backward(const Tensor& grad_tokens, const Tensor& slots, int64_t contextual, Merge merge) {
  const Sequences grads("grad_tokens", grad_tokens);
  const int64_t batch = grads.batch(), size = grads.size(), k = grads.rows() - contextual;
  check_contextual(contextual, grads.rows());
  const Matrix<int32_t> numbers("slots", slots, batch);
  const int64_t tokens = numbers.columns();
  // What each token gets that was merged into a contextual one.
  const std::vector<int64_t> counts = counts_of(numbers, batch, contextual);
  std::vector<const char*> ours(batch * contextual);
  std::vector<float> divisors(batch * contextual);
  for (int64_t row = 0; row < batch * contextual; ++row) {
    ours[row] = grads.at(row / contextual, k + row % contextual);
    divisors[row] = static_cast<float>(merge == Merge::kMean ? counts[row] + 1 : std::max<int64_t>(counts[row], 1));
  }
  const int64_t shared_sizes[] = {batch, contextual, size};
  Tensor shared = allocate(shared_sizes, 3, grad_tokens);
  const DividedRows args{dtype_of(grad_tokens), size, ours.data(), divisors.data(),
                         static_cast<char*>(shared.mutable_data_ptr())};
  if (shared.numel() > 0) {
    parallel_rows(batch * contextual, row_ranges(batch * contextual, size),
                  [&](int64_t begin, int64_t end, int64_t) { kernels().divide(args, begin, end); });
  }
  const int64_t row_bytes = size * static_cast<int64_t>(shared.element_size());
  std::vector<const char*> sources(batch * tokens);
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t slot = numbers.row(image)[token];
      const bool joins = slot >= contextual && slot < 2 * contextual;
      const char*& source = sources[image * tokens + token];  // null, and so zeros, for what went nowhere
      if (joins || (merge == Merge::kMean && slot >= 0 && slot < contextual)) {
        source = args.y + (image * contextual + slot - (joins ? contextual : 0)) * row_bytes;
      } else if (slot >= -k && slot < contextual) {
        source = grads.at(image, slot + k);
      }
    }
  }
  const int64_t sizes[] = {batch, tokens, size};
  return written_rows(sizes, 3, grad_tokens, size, sources.data());
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
