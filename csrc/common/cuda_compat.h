// Included by every .cu file: CUDA itself under nvcc, or its emulation on the CPU (tests/emulation) under g++ with
// -DVLMFAST_EMULATED. One source compiles as both, because kernels are launched by `launch`, dynamic shared memory is
// declared by VLMFAST_DYNAMIC_SHARED, and inline PTX is confined to the functions below, each of which has a
// counterpart in tests/emulation/cuda_host.h.
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

// Declares `name` as a pointer to T at the block's dynamic shared memory.
#define VLMFAST_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char vlmfast_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(vlmfast_dynamic_shared)

// Fails with cudaErrorAssert if the condition is false, even under NDEBUG. It refuses values that only the device can
// check, without a synchronisation.
#define VLMFAST_DEVICE_ASSERT(condition, message) \
  ((condition) ? static_cast<void>(0) : __assert_fail(message, __FILE__, __LINE__, __func__))

namespace vlmfast {

// Clears the error of a failed launch, which torch would otherwise report after its own next launch.
inline void forget_error() { cudaGetLastError(); }

// The largest grid that is launched. Kernels loop over their grid, so more blocks of work are possible.
constexpr int64_t kMaxBlocks = 2147483647;

// 2 ** x, to 2 ulp. Subnormal results are flushed to 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Computes sums += a @ b over a warp, with a (16, 16) row-major and b (16, 8) column-major in half precision, two
// elements to a register. In lane 4 g + t, a holds rows g, g + 8, g, g + 8 at depths 2 t + {0, 1}, plus 8 for the last
// two; b holds column g at depths 2 t + {0, 1}, plus 8 for the second; sums holds rows g, g, g + 8, g + 8 at columns 2
// t, 2 t + 1, 2 t, 2 t + 1.
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

// Launches kernel(args...). More than 48 KiB of dynamic shared memory is requested explicitly, as CUDA demands.
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
