// CUDA C++ for g++: those parts of the language, the intrinsics and the runtime API that the kernels of csrc/ use.
// csrc/common/cuda_compat.h includes this file under -DVLMFAST_EMULATED. A construct that is missing does not compile.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- qualifiers ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local, so that all __shared__ variables, those of templates too, lie in the library's one TLS segment: the
// runtime knows its bounds. They must be trivially constructible, as in CUDA.
#define __shared__ static thread_local
#define VLMFAST_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(vlmfast::emulation::dynamic_shared_memory(alignof(T)))

#define VLMFAST_DEVICE_ASSERT(condition, message) \
  ((condition) ? static_cast<void>(0) : vlmfast::emulation::fail("device-side assertion: %s", message))

#define EMULATION_API extern "C" __attribute__((visibility("default")))

// ---- vector types ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATION_VECTOR_TYPES(T, name)                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTOR_TYPES(float, float)
EMULATION_VECTOR_TYPES(int, int)
EMULATION_VECTOR_TYPES(unsigned, uint)
#undef EMULATION_VECTOR_TYPES

// ---- the runtime: scheduler.cpp, warp.cpp, memory.cpp ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

namespace vlmfast::emulation {

// The source line of a barrier or warp operation; as a default argument, that of the caller.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

enum class Barrier : uint8_t { kCount, kAnd, kOr };

enum class WarpOp : uint8_t {
  kShuffle,  // the shuffles must come first
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kSyncWarp,
  kMatchAny,
  kAdd,
  kMinUnsigned,
  kMaxUnsigned,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kXor,
};

struct Coordinates {
  uint3 thread, block;
};
extern Coordinates coordinates;  // of the running thread
extern dim3 block_shape, grid_shape;

// A launch as the runtime API describes it: the kernel, and the addresses of its arguments.
struct Call {
  const void* kernel;
  void* const* arguments;
  int count;
};

// Runs function(closure) in every thread of the grid, or hands the call over to whom the tests have named.
cudaError_t launch(const Call& call, void (*function)(void*), void* closure, dim3 grid, dim3 block,
                   size_t shared_bytes);
void* dynamic_shared_memory(size_t alignment);
int block_barrier(Barrier kind, int predicate, Site site);
uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, unsigned argument, int width, Site site);
void fence();
void check_atomic(const void* pointer, size_t size, void* return_address);
[[noreturn]] void fail(const char* format, ...);

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(From) <= sizeof(To), "a warp exchanges values of up to 8 bytes");
  To to{};
  __builtin_memcpy(&to, &from, sizeof from);
  return to;
}

template <typename T>
inline T shuffle(WarpOp op, unsigned mask, T value, unsigned argument, int width, Site site) {
  const uint64_t result = warp_op(op, mask, bits_as<uint64_t>(value), argument, width, site);
  __builtin_memcpy(&value, &result, sizeof value);
  return value;
}

inline unsigned vote(unsigned mask, bool predicate, Site site) {
  const unsigned lane =
      (coordinates.thread.x + block_shape.x * (coordinates.thread.y + block_shape.y * coordinates.thread.z)) % 32;
  return static_cast<unsigned>(warp_op(WarpOp::kOr, mask, uint64_t{predicate} << lane, 0, 32, site));
}

// What launches may count on; see vlmfast_emulation_gpu.
struct Gpu {
  int multiprocessors;
  int64_t most_blocks;
};
extern Gpu gpu;

}  // namespace vlmfast::emulation

#define threadIdx (vlmfast::emulation::coordinates.thread)
#define blockIdx (vlmfast::emulation::coordinates.block)
#define blockDim (vlmfast::emulation::block_shape)
#define gridDim (vlmfast::emulation::grid_shape)
constexpr int warpSize = 32;

// ---- barriers, fences, warp operations ----

#define SITE vlmfast::emulation::Site site = vlmfast::emulation::Site::here(__builtin_FILE(), __builtin_LINE())

inline void __syncthreads(SITE) { vlmfast::emulation::block_barrier(vlmfast::emulation::Barrier::kCount, 0, site); }
inline int __syncthreads_count(int predicate, SITE) {
  return vlmfast::emulation::block_barrier(vlmfast::emulation::Barrier::kCount, predicate, site);
}
inline int __syncthreads_and(int predicate, SITE) {
  return vlmfast::emulation::block_barrier(vlmfast::emulation::Barrier::kAnd, predicate, site);
}
inline int __syncthreads_or(int predicate, SITE) {
  return vlmfast::emulation::block_barrier(vlmfast::emulation::Barrier::kOr, predicate, site);
}
inline void __threadfence() { vlmfast::emulation::fence(); }
inline void __syncwarp(unsigned mask = ~0u, SITE) {
  vlmfast::emulation::warp_op(vlmfast::emulation::WarpOp::kSyncWarp, mask, 0, 0, 32, site);
}

#define EMULATION_SHUFFLE(name, op, Argument)                                                               \
  template <typename T>                                                                                     \
  inline T name(unsigned mask, T value, Argument argument, int width = 32, SITE) {                          \
    return vlmfast::emulation::shuffle(vlmfast::emulation::WarpOp::op, mask, value, argument, width, site); \
  }
EMULATION_SHUFFLE(__shfl_sync, kShuffle, int)
EMULATION_SHUFFLE(__shfl_up_sync, kShuffleUp, unsigned)
EMULATION_SHUFFLE(__shfl_down_sync, kShuffleDown, unsigned)
EMULATION_SHUFFLE(__shfl_xor_sync, kShuffleXor, int)
#undef EMULATION_SHUFFLE

#define EMULATION_REDUCE(name, op, T)                                                                                  \
  inline T name(unsigned mask, T value, SITE) {                                                                        \
    return static_cast<T>(                                                                                             \
        vlmfast::emulation::warp_op(vlmfast::emulation::WarpOp::op, mask, static_cast<uint32_t>(value), 0, 32, site)); \
  }
EMULATION_REDUCE(__reduce_add_sync, kAdd, unsigned)
EMULATION_REDUCE(__reduce_add_sync, kAdd, int)
EMULATION_REDUCE(__reduce_min_sync, kMinUnsigned, unsigned)
EMULATION_REDUCE(__reduce_min_sync, kMinSigned, int)
EMULATION_REDUCE(__reduce_max_sync, kMaxUnsigned, unsigned)
EMULATION_REDUCE(__reduce_max_sync, kMaxSigned, int)
EMULATION_REDUCE(__reduce_and_sync, kAnd, unsigned)
EMULATION_REDUCE(__reduce_or_sync, kOr, unsigned)
EMULATION_REDUCE(__reduce_xor_sync, kXor, unsigned)
#undef EMULATION_REDUCE

inline unsigned __ballot_sync(unsigned mask, int predicate, SITE) {
  return vlmfast::emulation::vote(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, SITE) {
  return vlmfast::emulation::vote(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SITE) {
  return vlmfast::emulation::vote(mask, predicate == 0, site) == 0;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, SITE) {
  using namespace vlmfast::emulation;
  return static_cast<unsigned>(warp_op(WarpOp::kMatchAny, mask, bits_as<uint64_t>(value), 0, 32, site));
}

// ---- memory ----

template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}

// Not instrumented, because an atomic access is checked by other rules.
#define EMULATION_ATOMIC(name, expression)                                                           \
  template <typename T>                                                                              \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* pointer, std::common_type_t<T> value) { \
    vlmfast::emulation::check_atomic(pointer, sizeof(T), __builtin_return_address(0));               \
    const T old = *pointer;                                                                          \
    *pointer = static_cast<T>(expression);                                                           \
    return old;                                                                                      \
  }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicSub, old - value)
EMULATION_ATOMIC(atomicMax, old < value ? value : old)
EMULATION_ATOMIC(atomicMin, value < old ? value : old)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicAnd, old& value)
EMULATION_ATOMIC(atomicExch, value)
#undef EMULATION_ATOMIC

template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* pointer, std::common_type_t<T> expected,
                                                             std::common_type_t<T> value) {
  vlmfast::emulation::check_atomic(pointer, sizeof(T), __builtin_return_address(0));
  const T old = *pointer;
  if (old == expected) *pointer = value;
  return old;
}

#undef SITE

// ---- arithmetic ----

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return vlmfast::emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return vlmfast::emulation::bits_as<float>(x); }
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// ---- half precision: storage and conversions; arithmetic goes through float ----

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(vlmfast::emulation::bits_as<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {vlmfast::emulation::bits_as<uint16_t>(static_cast<_Float16>(x))}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// ---- the runtime API ----

const char* cudaGetErrorString(cudaError_t error);  // the emulator's own message for the last launch

namespace vlmfast {

inline const int64_t& kMaxBlocks = emulation::gpu.most_blocks;

inline float fast_exp2(float x) { return exp2f(x); }

template <typename scalar_t>
inline float half_of(uint32_t pair, int which) {
  const scalar_t value{static_cast<uint16_t>(pair >> 16 * which)};
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// Products and their sums are exact here and rounded once. The registers of a warp are in memory that is not checked,
// between two votes: as on a GPU, the operation synchronises the lanes and orders no other memory.
template <typename scalar_t>
__attribute__((noinline, no_sanitize("thread"))) void multiply_tiles(
    float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2],
    emulation::Site site = emulation::Site::here(__builtin_FILE(), __builtin_LINE())) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  static Registers block[32][32];
  Registers* const warp = block[threadIdx.x / 32];  // blocks are one-dimensional
  const int lane = threadIdx.x % 32;
  memcpy(warp[lane].a, a, sizeof a);
  memcpy(warp[lane].b, b, sizeof b);
  emulation::vote(~0u, true, site);
  for (int i = 0; i < 4; ++i) {
    double exact = sums[i];
    for (int depth = 0; depth < 16; ++depth) {
      const Registers& row = warp[lane / 4 * 4 + depth % 8 / 2];
      const Registers& column = warp[(lane % 4 * 2 + i % 2) * 4 + depth % 8 / 2];
      exact += double{half_of<scalar_t>(row.a[i / 2 + depth / 8 * 2], depth % 2)} *
               half_of<scalar_t>(column.b[depth / 8], depth % 2);
    }
    sums[i] = static_cast<float>(exact);
  }
  emulation::vote(~0u, true, site);
}

inline void forget_error() {}  // nothing to do: launches return their errors and store none

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  const auto run = [&](Params... params) {
    void* const addresses[] = {&params..., nullptr};
    const emulation::Call call{reinterpret_cast<const void*>(kernel), addresses, sizeof...(Params)};
    // Not instrumented: the arguments are on the launcher's stack, which a kernel may not access otherwise.
    auto thread = [&]() __attribute__((no_sanitize("thread"))) { kernel(params...); };
    return emulation::launch(call, [](void* closure) { (*static_cast<decltype(thread)*>(closure))(); }, &thread, grid,
                             block, shared_bytes);
  };
  return run(static_cast<Params>(args)...);
}

}  // namespace vlmfast
