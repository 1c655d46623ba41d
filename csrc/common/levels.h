// The instruction sets that the CPU kernels were compiled for, and what this processor has of them.
#pragma once

#include <string_view>

#include "common/types.h"

namespace vlmfast {

inline constexpr std::string_view kLevelNames[] = {"baseline", "v3", "v4", "v4_bf16"};  // in the order of CpuLevel
constexpr CpuLevel kHighestLevel = CpuLevel::VLMFAST_HIGHEST_LEVEL;                     // the highest that was compiled

// Returns the highest level that this processor supports, compiled or not.
inline CpuLevel supported_cpu_level() {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) return CpuLevel::v4_bf16;
  return v4 ? CpuLevel::v4 : v3 ? CpuLevel::v3 : CpuLevel::baseline;
#else
  return CpuLevel::baseline;
#endif
}

}  // namespace vlmfast
