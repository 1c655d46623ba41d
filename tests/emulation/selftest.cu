// One small kernel per rule of the CUDA programming guide, which it keeps or, where `broken`, violates. The test is
// test_selftest.py.
#include "common/cuda_compat.h"

namespace vlmfast {
namespace {

enum class Exchange { kIndex, kUp, kDown, kXor, kBallot, kAny, kAll, kSum, kMaxSigned, kMinHalfWarp, kMatch, kCount };

__global__ void exchange_kernel(Exchange exchange, int width, int argument, int* out) {
  const int thread = threadIdx.x, value = 100 + thread;
  const unsigned half_warp = thread % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int result = 0;
  switch (exchange) {
    case Exchange::kIndex:
      result = __shfl_sync(~0u, value, argument, width);
      break;
    case Exchange::kUp:
      result = __shfl_up_sync(~0u, value, argument, width);
      break;
    case Exchange::kDown:
      result = __shfl_down_sync(~0u, value, argument, width);
      break;
    case Exchange::kXor:
      result = __shfl_xor_sync(~0u, value, argument, width);
      break;
    case Exchange::kBallot:
      result = static_cast<int>(__ballot_sync(~0u, thread % 3 == 0));
      break;
    case Exchange::kAny:
      result = __any_sync(~0u, thread == 40);
      break;
    case Exchange::kAll:
      result = __all_sync(~0u, thread != 40);
      break;
    case Exchange::kSum:
      result = __reduce_add_sync(~0u, value);
      break;
    case Exchange::kMaxSigned:
      result = __reduce_max_sync(~0u, -value);
      break;
    case Exchange::kMinHalfWarp:
      result = __reduce_min_sync(half_warp, value);
      break;
    case Exchange::kMatch:
      result = static_cast<int>(__match_any_sync(~0u, thread % 4));
      break;
    case Exchange::kCount:
      result = __syncthreads_count(thread % 2);
      break;
  }
  out[thread] = result;
}

// Two warps; static and dynamic shared memory of 64 ints each.
__global__ void barrier_kernel(int rule, bool broken, int* out) {
  __shared__ int shared[64];
  const int t = threadIdx.x;
  shared[t] = t;
  int result = t;
  switch (rule) {
    case 0:  // lanes of a warp exchange through shared memory behind __syncwarp; a vote orders no memory
      if (broken) {
        __any_sync(~0u, 1);
      } else {
        __syncwarp();
      }
      result = shared[t ^ 1];
      break;
    case 1:  // __syncwarp orders the lanes of its mask
      if (t % 32 < 16) {
        __syncwarp(0x0000ffffu);
      } else {
        __syncwarp(0xffff0000u);
      }
      result = shared[broken ? t ^ 16 : t ^ 1];
      break;
    case 2:  // other warps need __syncthreads
      if (broken) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      result = shared[t ^ 32];
      break;
    case 3:  // all threads of a block meet at a barrier
      if (!broken || t < 40) __syncthreads();
      break;
    case 4:  // all threads meet at the same barrier
      if (broken && t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 5:  // a shuffle reads only lanes that take part
      if (t % 32 < 8) result = __shfl_down_sync(0xffu, t, 4, broken ? 32 : 8);
      break;
    case 6:  // a mask names all lanes that call
      result = t % 32 < 8 ? __shfl_xor_sync(broken ? 0xfu : 0xffu, t, 1) : t;
      break;
    case 7:  // a lane that has exited takes part in nothing
      if (broken && t == 5) return;
      result = __shfl_xor_sync(~0u, t, 1);
      break;
    case 8:  // threads finish reading a buffer before others overwrite it
      __syncthreads();
      result = shared[t ^ 32];
      if (!broken) __syncthreads();
      shared[t] = result;
      break;
  }
  out[t] = result;
}

__global__ void memory_kernel(int rule, bool broken, const int* in, int* out) {
  __shared__ int shared[64];
  VLMFAST_DYNAMIC_SHARED(int, dynamic);
  const int t = threadIdx.x;
  int result = t;
  switch (rule) {
    case 0:  // shared memory is garbage until written
      if (!broken || t > 0) shared[t] = t;
      result = shared[t];
      break;
    case 1:  // accesses stay within dynamic shared memory
      dynamic[broken ? t + 1 : t] = t;
      break;
    case 2:  // accesses stay within a static array
      shared[broken ? t + 1 : t] = t;
      break;
    case 3:  // accesses stay within a tensor
      result = in[broken ? t + 1 : t];
      break;
    case 4:  // an input is read-only
      if (broken) const_cast<int*>(in)[t] = t;
      break;
    case 5:  // what lies between two rows of an input is not part of it: rows of 16 ints, 32 apart
      result = in[t / 16 * 32 + (broken ? 16 : t % 16)];
      break;
    case 6: {  // wide accesses are aligned
      const int4 values = *reinterpret_cast<const int4*>(in + (broken ? 1 : 0));
      result = values.x;
      break;
    }
    case 7:  // a barrier separates atomics from plain accesses
      if (t == 0) shared[0] = 0;
      __syncthreads();
      atomicAdd(&shared[0], 1);
      if (!broken) __syncthreads();
      result = shared[0];
      break;
    case 8:  // two threads do not write one element
      if (broken || t == 0) out[0] = 0;
      break;
    case 9: {  // a register is garbage until written
      int values[2];
      values[0] = t;
      if (!broken) values[1] = t;
      result = values[t / 64 + 1] < 0 ? in[1 << 20] : t;
      break;
    }
  }
  if (rule != 8) out[t] = result;
}

// Each block stores a partial sum; the last block to arrive adds them up, which is safe only behind a __threadfence.
__global__ void last_block_kernel(bool broken, int* parts, int* arrived, int* sum) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  if (!broken) __threadfence();
  if (atomicAdd(arrived, 1) != static_cast<int>(gridDim.x) - 1) return;
  int total = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) total += parts[block];
  *sum = total;
}

__global__ void convert_kernel(const float* in, __half* half, __nv_bfloat16* bfloat16, float* from_half,
                               float* from_bfloat16, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  half[i] = __float2half_rn(in[i]);
  bfloat16[i] = __float2bfloat16_rn(in[i]);
  from_half[i] = __half2float(half[i]);
  from_bfloat16[i] = __bfloat162float(bfloat16[i]);
}

}  // namespace
}  // namespace vlmfast

using namespace vlmfast;

EMULATION_API int selftest_exchange(int exchange, int width, int argument, int* out) {
  return launch(exchange_kernel, dim3(1), dim3(64), 0, nullptr, static_cast<Exchange>(exchange), width, argument, out);
}
EMULATION_API int selftest_barrier(int rule, int broken, const int*, int* out) {
  return launch(barrier_kernel, dim3(1), dim3(64), 0, nullptr, rule, broken != 0, out);
}
EMULATION_API int selftest_memory(int rule, int broken, const int* in, int* out) {
  return launch(memory_kernel, dim3(1), dim3(64), 64 * sizeof(int), nullptr, rule, broken != 0, in, out);
}
EMULATION_API int selftest_last_block(int, int broken, const int*, int* out) {
  return launch(last_block_kernel, dim3(20), dim3(32), 0, nullptr, broken != 0, out, out + 20, out + 21);
}
EMULATION_API int selftest_convert(const float* in, void* half, void* bfloat16, float* from_half, float* from_bfloat16,
                                   int count) {
  return launch(convert_kernel, dim3((count + 255) / 256), dim3(256), 0, nullptr, in, static_cast<__half*>(half),
                static_cast<__nv_bfloat16*>(bfloat16), from_half, from_bfloat16, count);
}
