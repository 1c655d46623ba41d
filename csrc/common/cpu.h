// Shared by the CPU ops: the choice of the instruction set, threads, and outputs on huge pages.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/common.h"
#include "common/levels.h"

namespace vlmfast {

// Returns the highest level that was compiled and that this processor supports, or the lower one named by
// VLMFAST_CPU_LEVEL, which tests set.
inline CpuLevel choose_cpu_level() {
  const CpuLevel supported = supported_cpu_level();
  const char* value = std::getenv("VLMFAST_CPU_LEVEL");
  if (value == nullptr || *value == '\0') return std::min(supported, kHighestLevel);
  const auto found = std::find(std::begin(kLevelNames), std::end(kLevelNames), value);
  STD_TORCH_CHECK(found != std::end(kLevelNames), "VLMFAST_CPU_LEVEL must be one of baseline, v3, v4, v4_bf16, got ",
                  value);
  const auto level = static_cast<CpuLevel>(found - kLevelNames);
  STD_TORCH_CHECK(level <= supported, "VLMFAST_CPU_LEVEL is ", value, ", which this processor does not have");
  STD_TORCH_CHECK(level <= kHighestLevel, "VLMFAST_CPU_LEVEL is ", value, ", which this build does not have");
  return level;
}

// Returns the kernels of a family for the chosen level.
template <class Kernels>
const Kernels& kernels() {
  static const Kernels table = [] {
    [[maybe_unused]] const CpuLevel level = choose_cpu_level();
    if constexpr (kHighestLevel >= CpuLevel::v4_bf16 && kHasBf16Level<Kernels>) {
      if (level >= CpuLevel::v4_bf16) return kernels_at<Kernels, CpuLevel::v4_bf16>();
    }
    if constexpr (kHighestLevel >= CpuLevel::v4) {
      if (level >= CpuLevel::v4) return kernels_at<Kernels, CpuLevel::v4>();
    }
    if constexpr (kHighestLevel >= CpuLevel::v3) {
      if (level >= CpuLevel::v3) return kernels_at<Kernels, CpuLevel::v3>();
    }
    return kernels_at<Kernels, CpuLevel::baseline>();
  }();
  return table;
}

inline void check_ascending(const char* name, const View<2>& positions, int64_t end) {
  for (int64_t row = 0; row < positions.size(0); ++row) {
    const int64_t* const own = positions.at<int64_t>(row);
    int64_t before = -1;
    for (int64_t i = 0; i < positions.size(1); before = own[i++]) {
      STD_TORCH_CHECK(before < own[i] && own[i] < end, name, " must be ascending within 0 and ", end - 1,
                      " in each row");
    }
  }
}

// Below this many elements, one thread finishes sooner than it takes to wake a second.
constexpr int64_t kParallelElements = 32768;

// Returns how many ranges of rows to process in parallel.
inline int64_t row_ranges(int64_t rows, int64_t size) {
  const int64_t most = std::min(rows, rows * size / (kParallelElements / 2));
  return most < 2 ? 1 : std::min<int64_t>(most, torch::stable::get_num_threads());
}

// Calls body(begin, end, range) on `ranges` nearly equal ranges of rows, each on one thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t ranges, const Body& body) {
  if (ranges <= 1) return body(0, rows, 0);
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t range = first; range < last; ++range) {
      body(rows * range / ranges, rows * (range + 1) / ranges, range);
    }
  });
}

// Allocates an uninitialised contiguous tensor that a kernel is about to fill, on huge pages if it is large. The first
// write to each new page is a page fault; on 4 kB pages these faults cost more than the kernel itself. With huge pages
// RMSNorm of 4096 x 4096 bfloat16 takes 4 ms instead of 17 ms, and place_embeddings into 17 MB takes 3.5 ms instead of
// 13.8 ms (EPYC, one thread, transparent_hugepage=madvise).
inline Tensor allocate_output(IntHeaderOnlyArrayRef sizes, const Tensor& like, Dtype dtype) {
  Tensor output = allocate(sizes, like, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = 8 << 20;  // four huge pages of 2 MB
  uintptr_t bytes = info(dtype).width;
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kWorthwhile) return output;
  const uintptr_t data = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: failure is harmless
#endif
  return output;
}

}  // namespace vlmfast
