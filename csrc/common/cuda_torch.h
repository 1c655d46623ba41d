// The torch side of the CUDA ops: device, stream, pointers and dtypes. Uses only torch's stable ABI.
#pragma once

#if !defined(VLMFAST_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // enables the CUDA declarations of torch's C shim, also in the headers of a CPU-only torch
#endif

#include <algorithm>

#include "common/common.h"
#include "common/cuda_compat.h"

namespace vlmfast {

constexpr int kVectorBytes = 16;  // the widest load or store

// A view of `rank` dimensions, as a kernel argument.
template <typename scalar_t, int rank>
struct Input {
  const scalar_t* data = nullptr;
  int64_t strides[rank > 1 ? rank - 1 : 1] = {};  // in elements; the last dimension is contiguous

  // Returns the row at the given leading indices.
  template <typename... Indices>
  __device__ __forceinline__ const scalar_t* at(Indices... indices) const {
    static_assert(sizeof...(indices) == rank - 1);
    const scalar_t* row = data;
    int dim = 0;
    ((row += indices * strides[dim++]), ...);
    return row;
  }
};

// Makes the kernel argument of a view. Strides count elements of scalar_t, which may be narrower than those of the
// view.
template <typename scalar_t, int rank>
Input<scalar_t, rank> as_input(const View<rank>& view) {
  Input<scalar_t, rank> input{view.template at<scalar_t>()};
  for (int dim = 0; dim < rank - 1; ++dim) {
    input.strides[dim] = view.stride(dim) * (view.width() / static_cast<int64_t>(sizeof(scalar_t)));
  }
  return input;
}

// Returns whether every row of the views is aligned to, and a multiple of, `bytes` bytes.
template <int... ranks>
bool vectors_fit(int64_t bytes, const View<ranks>&... views) {
  const auto fits = [&](const auto& view, int rank) {
    bool aligned =
        reinterpret_cast<uintptr_t>(view.data()) % bytes == 0 && view.size(rank - 1) * view.width() % bytes == 0;
    for (int dim = 0; dim < rank - 1; ++dim) aligned = aligned && view.stride(dim) * view.width() % bytes == 0;
    return aligned;
  };
  return (fits(views, ranks) && ...);
}

}  // namespace vlmfast

#ifdef VLMFAST_EMULATED
#include "torch_host.h"
#define VLMFAST_REGISTER_CUDA_OPS()        \
  VLMFAST_DEFINE_OPS(VLMFAST_CUDA_LIBRARY) \
  VLMFAST_IMPLEMENT_OPS(VLMFAST_CUDA_LIBRARY, CPU)
#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#define VLMFAST_REGISTER_CUDA_OPS() VLMFAST_IMPLEMENT_OPS(vlmfast_native, CUDA)  // the schemas are defined in cpu.cpp

namespace vlmfast {

// Makes the device of a tensor the current one. Launchers get all kernel pointers from it, so that the emulation can
// check every access.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    static const std::vector<int> counts = [] {  // queried once: a query costs as much as a launch
      int devices = 0;
      cudaGetDeviceCount(&devices);
      std::vector<int> counts(devices);
      for (int i = 0; i < devices; ++i) cudaDeviceGetAttribute(&counts[i], cudaDevAttrMultiProcessorCount, i);
      return counts;
    }();
    return counts.at(device_);
  }

  template <typename scalar_t, int rank>
  Input<scalar_t, rank> input(const View<rank>& view) const {
    return as_input<scalar_t>(view);
  }

  template <typename scalar_t>
  scalar_t* output(const Tensor& tensor) const {
    return static_cast<scalar_t*>(tensor.mutable_data_ptr());
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace vlmfast
#endif

namespace vlmfast {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) forget_error();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// Launches kernel(args...) on the current stream in a grid of at most kMaxBlocks blocks; the kernel loops over its
// grid.
template <typename... Params, typename... Args>
void launch_blocks(const DeviceScope& scope, void (*kernel)(Params...), int64_t blocks, dim3 threads,
                   size_t shared_bytes, Args... args) {
  check_cuda(launch(kernel, dim3(std::min(blocks, kMaxBlocks)), threads, shared_bytes, scope.stream(), args...));
}

// Calls function(scalar_t()) for the storage type of a dtype. Tests that need no type but bfloat16 are compiled with
// VLMFAST_BFLOAT16_ALONE, in half the time.
template <typename Function>
void with_dtype(Dtype dtype, Function&& function) {
#ifdef VLMFAST_BFLOAT16_ALONE
  STD_TORCH_CHECK(dtype == Dtype::kBFloat16, "this build has kernels for bfloat16 alone");
#else
  if (dtype == Dtype::kFloat32) function(float());
  if (dtype == Dtype::kFloat16) function(__half());
#endif
  if (dtype == Dtype::kBFloat16) function(__nv_bfloat16());
}

// Allocates a float32 buffer of `count` elements on the device of `like`.
inline Tensor float_buffer(int64_t count, const Tensor& like) { return allocate({count}, like, Dtype::kFloat32); }

}  // namespace vlmfast
