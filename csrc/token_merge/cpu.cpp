// The choice and merging of tokens on the CPU: arguments, outputs, threads, and the source of each row. The arithmetic
// is in cpu_kernels.cpp.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/row_moves.h"
#include "token_merge/cpu_kernels.h"
#include "token_merge/ops.h"

namespace vlmfast {
namespace {

// Slots in [contextual, 2 * contextual) are those of joining tokens, slots in [0, contextual) those of their targets.
bool is_joining(int64_t slot, int64_t contextual) { return slot >= contextual && slot < 2 * contextual; }
bool is_target(int64_t slot, int64_t contextual) { return slot >= 0 && slot < contextual; }

// Returns how many tokens join each contextual token, for the whole batch.
std::vector<int64_t> count_joining(const View<2>& slots, int64_t contextual) {
  const int64_t batch = slots.size(0), tokens = slots.size(1);
  std::vector<int64_t> counts(batch * contextual);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t slot = slots.at<int32_t>(b)[token];
      if (is_joining(slot, contextual)) ++counts[b * contextual + slot - contextual];
    }
  }
  return counts;
}

Tensor top_tokens(const Tensor& scores_tensor, int64_t k) {
  const TopTokensArguments call(scores_tensor, k);
  const int64_t batch = call.batch, tokens = call.tokens;
  Tensor kept = allocate({batch, k}, scores_tensor, Dtype::kInt64);
  int64_t* const positions = static_cast<int64_t*>(kept.mutable_data_ptr());
  const auto order = kernels<TokenMergeKernels>().order[call.dtype];
  std::vector<uint8_t> valid(batch);
  parallel_rows(batch, row_ranges(batch, tokens), [&](int64_t begin, int64_t end, int64_t) {
    std::vector<uint32_t> keys(tokens), sorted(tokens);
    for (int64_t b = begin; b < end; ++b) {
      valid[b] = order(call.scores.at(b), tokens, keys.data());
      if (k == 0 || !valid[b]) continue;
      std::copy(keys.begin(), keys.end(), sorted.begin());
      std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
      const uint32_t least = sorted[k - 1];
      // Of the tokens with the least kept score, the first ones are kept.
      int64_t equal = k - std::count_if(sorted.begin(), sorted.begin() + k, [&](uint32_t key) { return key > least; });
      int64_t* to = positions + b * k;
      for (int64_t token = 0; token < tokens; ++token) {
        if (keys[token] > least || (keys[token] == least && equal-- > 0)) *to++ = token;
      }
    }
  });
  STD_TORCH_CHECK(std::find(valid.begin(), valid.end(), 0) == valid.end(), "scores must not be NaN");
  return kept;
}

Tensor merge_slots(const Tensor& metric_tensor, const Tensor& kept_tensor, int64_t contextual) {
  const MergeSlotsArguments call(metric_tensor, kept_tensor, contextual);
  check_ascending("kept", call.kept, call.tokens);
  const int64_t batch = call.batch, tokens = call.tokens, kept_count = call.kept_count, head_dim = call.hidden;
  const int64_t left = tokens - kept_count, joining = left - contextual;
  Tensor slots = allocate({batch, tokens}, metric_tensor, Dtype::kInt32);
  int32_t* const numbers = static_cast<int32_t*>(slots.mutable_data_ptr());
  const int64_t step = contextual > 0 ? left / contextual : 1;
  std::vector<const char*> targets, joins;
  std::vector<int64_t> positions;
  targets.reserve(batch * contextual);
  joins.reserve(contextual > 0 ? batch * joining : 0);
  positions.reserve(joins.capacity());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* const kept_positions = call.kept.at<int64_t>(b);
    int64_t rank = 0, other = 0;
    for (int64_t token = 0; token < tokens; ++token) {
      int32_t& slot = numbers[b * tokens + token];
      if (rank < kept_count && kept_positions[rank] == token) {
        slot = static_cast<int32_t>(rank++ - kept_count);
      } else if (contextual == 0) {
        slot = static_cast<int32_t>(-kept_count - 1);
      } else if (other % step == 0 && other / step < contextual) {
        slot = static_cast<int32_t>(other++ / step);
        targets.push_back(call.rows.at(b, token));
      } else {
        ++other;
        joins.push_back(call.rows.at(b, token));
        positions.push_back(b * tokens + token);
      }
    }
  }
  if (joins.empty()) return slots;
  const auto& table = kernels<TokenMergeKernels>();
  const int64_t count = static_cast<int64_t>(joins.size());
  const std::unique_ptr<double[]> panels(new double[batch * table.packed_targets(contextual, head_dim)]);
  const MergeSlots args{head_dim,     contextual,       joining,      targets.data(),
                        joins.data(), positions.data(), panels.get(), numbers};
  table.pack_targets[call.dtype](args, batch);
  parallel_rows(count, row_ranges(count, contextual * head_dim), [&](int64_t begin, int64_t end, int64_t) {
    const std::unique_ptr<double[]> room(new double[kMergeRoom * head_dim]);
    table.assign[call.dtype](args, begin, end, room.get());
  });
  return slots;
}

Tensor merge_rows(const Tensor& hidden_tensor, const Tensor& kept_tensor, const Tensor& slots_tensor,
                  int64_t contextual, Merge merge) {
  const MergeRowsArguments call(hidden_tensor, kept_tensor, slots_tensor, contextual);
  check_ascending("kept", call.kept, call.tokens);
  const View<3>& x = call.rows;
  const View<2>& slots = call.slots;
  const int64_t batch = call.batch, tokens = call.tokens, kept_count = call.kept_count, hidden = call.hidden;
  const int64_t merged_count = kept_count + contextual, rows = batch * merged_count;
  Tensor y = allocate_output({batch, merged_count, hidden}, hidden_tensor, call.dtype);
  if (y.numel() == 0) return y;

  // A counting sort: `first` is the row that each merged row begins with, `joining` lists the rows merged into them.
  const std::vector<int64_t> counts = count_joining(slots, contextual);
  std::vector<const char*> first(rows);
  std::vector<int64_t> ends(rows);
  int64_t joined = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row = b * merged_count;
    for (int64_t i = 0; i < kept_count; ++i) {
      first[row + i] = x.at(b, call.kept.at<int64_t>(b)[i]);
      ends[row + i] = joined;
    }
    for (int64_t c = 0; c < contextual; ++c) {
      first[row + kept_count + c] = x.at(b);  // in case that no slot names a target
      ends[row + kept_count + c] = joined;    // the begin of the range; becomes its end below
      joined += counts[b * contextual + c];
    }
  }
  std::vector<const char*> joining(joined);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t row = b * merged_count + kept_count;
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t slot = slots.at<int32_t>(b)[token];
      if (is_target(slot, contextual)) first[row + slot] = x.at(b, token);
      if (is_joining(slot, contextual)) joining[ends[row + slot - contextual]++] = x.at(b, token);
    }
  }
  const MergedRows args{
      merge, hidden, rows, first.data(), ends.data(), joining.data(), static_cast<char*>(y.mutable_data_ptr())};
  // Threads share out the columns, because the rows differ in the number of tokens merged into them.
  const auto merge_columns = kernels<TokenMergeKernels>().merge[call.dtype];
  const int64_t blocks = padded(hidden) / kBlock;
  parallel_rows(blocks, row_ranges(blocks, kBlock * (rows + joined)), [&](int64_t begin, int64_t end, int64_t) {
    merge_columns(args, begin * kBlock, std::min<int64_t>(end * kBlock, hidden));
  });
  return y;
}

Tensor merge_rows_backward(const Tensor& grad_tensor, const Tensor& slots_tensor, int64_t contextual, Merge merge) {
  const MergeGradientArguments call(grad_tensor, slots_tensor, contextual);
  const View<3>& grads = call.grad;
  const View<2>& slots = call.slots;
  const int64_t batch = call.batch, tokens = call.tokens, hidden = call.hidden;
  const int64_t kept_count = call.merged_count - contextual;
  // The part of a contextual token's gradient that each token merged into it receives.
  const std::vector<int64_t> counts = count_joining(slots, contextual);
  std::vector<const char*> contextual_grads(batch * contextual);
  std::vector<float> divisors(batch * contextual);
  for (int64_t row = 0; row < batch * contextual; ++row) {
    contextual_grads[row] = grads.at(row / contextual, kept_count + row % contextual);
    divisors[row] = static_cast<float>(merge == Merge::kMean ? counts[row] + 1 : std::max<int64_t>(counts[row], 1));
  }
  Tensor shared = allocate({batch, contextual, hidden}, grad_tensor, call.dtype);
  const DividedRows args{hidden, contextual_grads.data(), divisors.data(),
                         static_cast<char*>(shared.mutable_data_ptr())};
  if (shared.numel() > 0) {
    const auto divide = kernels<TokenMergeKernels>().divide[call.dtype];
    parallel_rows(batch * contextual, row_ranges(batch * contextual, hidden),
                  [&](int64_t begin, int64_t end, int64_t) { divide(args, begin, end); });
  }
  const int64_t row_bytes = hidden * grads.width();
  std::vector<const char*> sources(batch * tokens);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t slot = slots.at<int32_t>(b)[token];
      const char*& source = sources[b * tokens + token];  // null, and so zeros, for a dropped token
      if (is_joining(slot, contextual)) {
        source = args.y + (b * contextual + slot - contextual) * row_bytes;
      } else if (merge == Merge::kMean && is_target(slot, contextual)) {
        source = args.y + (b * contextual + slot) * row_bytes;
      } else if (slot >= -kept_count && slot < contextual) {
        source = grads.at(b, slot + kept_count);
      }
    }
  }
  return written_rows({batch, tokens, hidden}, grad_tensor, hidden, sources.data());
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
