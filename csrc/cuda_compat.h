// What every .cu file builds on: CUDA itself under nvcc, or its emulation on the CPU (tests/emulation) under g++ with
// -DVLMFAST_EMULATED. So that one source serves both, launches go through `launch`, dynamic shared memory through
// VLMFAST_DYNAMIC_SHARED, and inline PTX only into functions that have a twin in tests/emulation/cuda_host.h.
#pragma once

#ifdef VLMFAST_EMULATED
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// Declares `name` as the block's dynamic shared memory, elements of type T.
#define VLMFAST_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char vlmfast_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(vlmfast_dynamic_shared)

// Ends all kernels with cudaErrorAssert, whatever NDEBUG says: how the rows of a call that only the device can check
// are refused without waiting for it.
#define VLMFAST_DEVICE_ASSERT(condition, message) \
  ((condition) ? static_cast<void>(0) : __assert_fail(message, __FILE__, __LINE__, __func__))

namespace vlmfast {

// Clears the error that a failed launch leaves behind, or torch would report it again after its own next launch.
inline void forget_error() { cudaGetLastError(); }

// The largest grid that kernels ask for; they loop over what is beyond it.
constexpr int64_t kMaxBlocks = 2147483647;

// Launches kernel(args...), with more than 48 KiB of dynamic shared memory where asked for.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace vlmfast
#endif
