// Merges tokens into the slots of merge_slots, and moves gradients back: one launch each. Both are deterministic: there
// are no atomics on floats.
#pragma once

#include <algorithm>

#include "token_merge/merge_slots.cuh"
#include "token_merge/top_tokens.cuh"

namespace vlmfast {

// One warp per row, of any length.
template <int kVec>
using WarpRow = RowPolicy<kVec, kWarp, 1, 1, true>;

// Returns the divisor of the sum of the `count` merged rows; under "mean" the target counts as well.
__device__ __forceinline__ float divisor_of(Merge merge, int count) {
  return merge == Merge::kMean ? 1.f + count : max(count, 1);
}

// A block takes a slice of one contextual row, with its members distributed over the warps, or kWarps kept rows, one
// for each warp.
struct MergePolicy {
  static constexpr int kThreads = 512, kWarps = kThreads / kWarp;
  static constexpr int kVectors = 8;     // in flight for each lane while a row is moved
  static constexpr int kRows = 8;        // in flight for each warp while rows are summed
  static constexpr int kMembers = 2048;  // tokens whose slots are scanned at a time
  unsigned slices, sums, blocks;         // slices per contextual row; blocks of the first kind; blocks of both kinds

  MergePolicy(const MergeSizes& sizes, int vec) {
    const int64_t per_row = (sizes.hidden + kWarp * vec - 1) / (kWarp * vec);
    const int64_t all_sums = sizes.batch * sizes.contextual * per_row;
    const int64_t all = all_sums + (sizes.batch * sizes.kept_count + kWarps - 1) / kWarps;
    STD_TORCH_CHECK(all < int64_t{1} << 27, "the merged rows must have fewer parts than 2^27");  // counted in 32 bits
    slices = per_row, sums = all_sums, blocks = all;
  }
};

// Moves a row of `hidden` elements with one warp, after change(vector) on each vector. `from` is null for zeros.
template <typename Vec, typename scalar_t, typename Change>
__device__ __forceinline__ void move_row(const scalar_t* from, scalar_t* to, int hidden, Change change) {
  constexpr int kVec = sizeof(Vec) / sizeof(scalar_t), kStep = kWarp * kVec, kVectors = MergePolicy::kVectors;
  for (int column = threadIdx.x % kWarp * kVec; column < hidden; column += kStep * kVectors) {
    const int left = hidden - column, loaded = from != nullptr ? left : 0;
    Vec values[kVectors] = {};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k * kStep < loaded) values[k] = Vec::load(from + column + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k * kStep < left) {
        change(values[k]);
        values[k].store(to + column + k * kStep);
      }
    }
  }
}

// The positions of the tokens merged into a contextual row, in ascending order, and the sums of each warp. Lives in
// shared memory.
template <int kColumns>
struct Members {
  float warp_sums[MergePolicy::kWarps][kColumns];
  BlockCount<MergePolicy::kThreads> block_count;
  int positions[MergePolicy::kMembers];
  int target;

  // Scans up to kMembers slots from `first` on, lists the tokens that join slot `number`, and returns how many there
  // are. Called by the whole block; ends with a barrier.
  __device__ __forceinline__ int list(const int32_t* slots, int first, const MergeSizes& sizes, int number, int& turn) {
    const int end = min(sizes.tokens - first, MergePolicy::kMembers);
    int listed = 0;
    for (int begin = first; begin < first + end; begin += MergePolicy::kThreads) {
      const int position = begin + threadIdx.x;
      const int slot = position < first + end ? slots[position] : -1;
      const bool joins = slot == sizes.contextual + number;
      const unsigned lanes = __ballot_sync(kAllLanes, joins);
      const auto sums = block_count.add_up(__popc(lanes), turn++);
      if (joins) positions[listed + sums.earlier_warps + __popc(lanes & earlier_lanes())] = position;
      if (slot == number) atomicMax(&target, position);
      listed += sums.block;
    }
    __syncthreads();
    return listed;
  }
};

// Limited (merge_rows_kernel): each block looks in all slots of a sequence for the tokens that join its row, of which it
// adds up 512 bytes each
template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(MergePolicy::kThreads, 1)
    merge_rows_kernel(Input<scalar_t, 3> hidden,      // (batch, tokens, hidden)
                      Input<int64_t, 2> kept,         // (batch, kept_count)
                      Input<int32_t, 2> slots,        // (batch, tokens)
                      scalar_t* __restrict__ merged,  // (batch, kept_count + contextual, hidden)
                      MergeSizes sizes, Merge merge, MergePolicy policy) {
  using Vec = Vector<scalar_t, kVec>;
  constexpr int kColumns = kWarp * kVec, kWarps = MergePolicy::kWarps, kRows = MergePolicy::kRows;
  VLMFAST_DYNAMIC_SHARED(Members<kColumns>, shared);
  Members<kColumns>& members = *shared;
  const int warp = threadIdx.x / kWarp, own_column = threadIdx.x % kWarp * kVec;
  const int rows = sizes.kept_count + sizes.contextual;
  int turn = 0;

  for (unsigned work = blockIdx.x; work < policy.blocks; work += gridDim.x) {
    if (work >= policy.sums) {
      const unsigned row = (work - policy.sums) * kWarps + warp;
      const int64_t batch = row / sizes.kept_count, rank = row % sizes.kept_count;
      if (batch >= sizes.batch) continue;
      const int64_t position = min(max(kept.at(batch)[rank], int64_t{0}), int64_t{sizes.tokens - 1});
      move_row<Vec>(hidden.at(batch, position), merged + (batch * rows + rank) * sizes.hidden, sizes.hidden,
                    [](Vec&) {});
      continue;
    }
    // Consecutive blocks take adjacent slices of one contextual row.
    const int64_t batch = work / policy.slices / sizes.contextual;
    const int number = work / policy.slices % sizes.contextual;
    const int64_t first_column = int64_t{work % policy.slices} * kColumns, column = first_column + own_column;
    __syncthreads();  // all threads are done with the previous row
    if (threadIdx.x == 0) members.target = -1;
    float sums[kVec] = {};
    int count = 0;
    for (int first = 0; first < sizes.tokens; first += MergePolicy::kMembers) {
      const int listed = members.list(slots.at(batch), first, sizes, number, turn);
      count += listed;
      if (column >= sizes.hidden) continue;
      for (int member = warp; member < listed; member += kWarps * kRows) {
        Vec values[kRows] = {};
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          if (member + k * kWarps < listed) {
            values[k] = Vec::load(hidden.at(batch, members.positions[member + k * kWarps]) + column);
          }
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          if (member + k * kWarps >= listed) break;  // a warp often has one member
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[i] += values[k][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) members.warp_sums[warp][own_column + i] = sums[i];
    __syncthreads();
    const int64_t out_column = first_column + threadIdx.x;
    if (threadIdx.x < kColumns && out_column < sizes.hidden) {
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += members.warp_sums[other][threadIdx.x];
      const float target = to_float(hidden.at(batch, max(members.target, 0))[out_column]);
      const float divisor = divisor_of(merge, count);
      const float row = merge == Merge::kMean ? (target + sum) / divisor : target + sum / divisor;
      merged[(batch * rows + sizes.kept_count + number) * sizes.hidden + out_column] = from_float<scalar_t>(row);
    }
  }
}

// A block takes a chunk of the tokens of one sequence. Each block counts all slots of the sequence, so there are only
// enough blocks to fill the GPU.
struct MergeBackwardPolicy {
  static constexpr int kBlocksPerMultiprocessor = 4;
  static constexpr int kCounts = 2048;  // contextual tokens whose members are counted at a time
  int chunk, chunks;                    // tokens of a block, and blocks of a sequence
  unsigned blocks;                      // of all sequences
  size_t shared_bytes;

  MergeBackwardPolicy(const MergeSizes& sizes, int64_t multiprocessors) {
    constexpr int64_t kWarps = MergePolicy::kWarps;
    const int64_t most = multiprocessors * kBlocksPerMultiprocessor;
    const int64_t wanted = std::clamp<int64_t>((sizes.batch * sizes.tokens + most - 1) / most, 1, sizes.tokens);
    chunk = static_cast<int>((wanted + kWarps - 1) / kWarps * kWarps);
    chunks = (sizes.tokens + chunk - 1) / chunk;
    STD_TORCH_CHECK(sizes.batch * chunks <= kMostInt, "the sequences must have fewer parts than 2^31");
    blocks = sizes.batch * chunks;
    shared_bytes = std::clamp(sizes.contextual, 1, kCounts) * sizeof(int);
  }
};

template <typename scalar_t, int kVec>
__global__ void __launch_bounds__(MergePolicy::kThreads)
    merge_rows_backward_kernel(Input<scalar_t, 3> grad,             // (batch, kept_count + contextual, hidden)
                               Input<int32_t, 2> slots,             // (batch, tokens)
                               scalar_t* __restrict__ grad_hidden,  // (batch, tokens, hidden)
                               MergeSizes sizes, Merge merge, MergeBackwardPolicy policy) {
  using Vec = Vector<scalar_t, kVec>;
  constexpr int kCounts = MergeBackwardPolicy::kCounts, kThreads = MergePolicy::kThreads;
  VLMFAST_DYNAMIC_SHARED(int, counts);  // the number of tokens merged into each contextual token
  const int contextual = sizes.contextual, lane = threadIdx.x % kWarp;
  for (unsigned work = blockIdx.x; work < policy.blocks; work += gridDim.x) {
    const int64_t batch = work / policy.chunks;
    const int first = work % policy.chunks * policy.chunk, end = min(first + policy.chunk, sizes.tokens);
    const int32_t* const own_slots = slots.at(batch);
    for (int first_number = 0; first_number == 0 || first_number < contextual; first_number += kCounts) {
      const int numbers = min(kCounts, contextual - first_number);
      __syncthreads();  // all threads are done with the previous counts
      for (int i = threadIdx.x; i < numbers; i += kThreads) counts[i] = 0;
      __syncthreads();
      // Warps without a token are done, and all lanes of the others take part in the ballot.
      for (int position = threadIdx.x; position - lane < sizes.tokens; position += kThreads) {
        const unsigned slot = position < sizes.tokens ? own_slots[position] : -1;
        const unsigned number = slot - static_cast<unsigned>(contextual + first_number);
        count_one(counts, number, position < sizes.tokens && number < static_cast<unsigned>(numbers));
      }
      __syncthreads();
      for (int token = first + threadIdx.x / kWarp; token < end; token += MergePolicy::kWarps) {
        const int slot = own_slots[token];
        const bool is_contextual = slot >= 0 && slot < 2 * contextual, joined = slot >= contextual;
        const int number = joined ? slot - contextual : slot;
        const unsigned index = static_cast<unsigned>(number) - static_cast<unsigned>(first_number);
        if (is_contextual ? index >= static_cast<unsigned>(numbers) : first_number > 0) continue;
        const bool has_row = is_contextual || (slot < 0 && slot + sizes.kept_count >= 0);
        const bool shares = is_contextual && (joined || merge == Merge::kMean);
        const float divisor = shares ? divisor_of(merge, counts[index]) : 1.f;
        move_row<Vec>(has_row ? grad.at(batch, int64_t{number} + sizes.kept_count) : nullptr,
                      grad_hidden + (batch * sizes.tokens + token) * sizes.hidden, sizes.hidden, [&](Vec& values) {
          if (divisor == 1.f) return;  // a copy
          values.fill([&](int i) { return values[i] / divisor; });
        });
      }
    }
  }
}

}  // namespace vlmfast
