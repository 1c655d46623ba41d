// The ground of every .cu file: CUDA itself under nvcc, or its emulation on the CPU (tests/emulation) under g++ with
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
#include <type_traits>

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

// 2 ** x, to 2 ulp; a result below the normal numbers is 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// sums += a @ b over a warp: a (16, 16) by rows, b (16, 8) by columns, half precision, two elements a register. With
// lane = 4 g + t: a holds rows g, g + 8, g, g + 8 at depths 2 t + {0, 1}, the last two at 8 more; b column g at the
// same depths; sums rows g, g, g + 8, g + 8 at columns 2 t, 2 t + 1.
template <typename scalar_t>
__device__ __forceinline__ void multiply_tiles(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<scalar_t, __nv_bfloat16>, "tensor cores take half precision here");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

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
