// Tells `vlmfast info` which instruction set the CPU kernels use.
#include "common/levels.h"

#include <algorithm>

namespace {

const char* name_of(vlmfast::CpuLevel level) { return vlmfast::kLevelNames[static_cast<int>(level)].data(); }

}  // namespace

extern "C" {

// Returns the highest level that was compiled and that this processor has.
__attribute__((visibility("default"))) const char* vlmfast_cpu_level() {
  return name_of(std::min(vlmfast::supported_cpu_level(), vlmfast::kHighestLevel));
}

// Returns the highest level that this processor has, compiled or not.
__attribute__((visibility("default"))) const char* vlmfast_supported_cpu_level() {
  return name_of(vlmfast::supported_cpu_level());
}
}
