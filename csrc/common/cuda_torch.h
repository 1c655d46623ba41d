// What the launchers of the CUDA kernels need of torch: device, stream, pointers, registration. Stable ABI only.
#pragma once

#if !defined(VLMFAST_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // torch's C shim declares its CUDA part only then; a CPU-only torch will do to compile it
#endif

#include <initializer_list>

#include "common/common.h"
#include "common/cuda_compat.h"

namespace vlmfast {

constexpr int kVectorBytes = 16;  // the widest load or store

// Rows as a kernel takes them.
template <typename scalar_t>
struct RowPointer {
  const scalar_t* data = nullptr;
  int64_t stride = 0;  // in elements

  __device__ __forceinline__ const scalar_t* operator[](int64_t row) const { return data + row * stride; }

  // Does each row start at a multiple of so many bytes?
  bool aligned_to(int64_t bytes) const {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * sizeof(scalar_t) % bytes == 0;
  }
};

// Images of rows, as a kernel takes them.
template <typename scalar_t>
struct ImagePointer {
  const scalar_t* data;
  int64_t image_stride, row_stride;  // in elements

  __device__ __forceinline__ const scalar_t* at(int64_t image, int64_t row) const {
    return data + image * image_stride + row * row_stride;
  }
  RowPointer<scalar_t> rows() const { return {data, row_stride}; }
  RowPointer<scalar_t> images() const { return {data, image_stride}; }
};

// A (B, H, T, D) tensor: read in place, whatever the strides; copied once where elements are not adjacent.
struct Heads {
  Tensor tensor;  // owns the data
  int64_t batch, count, rows, size;
  int64_t batch_stride, head_stride, row_stride;  // in elements; 0 where no kernel takes a step

  explicit Heads(Tensor from) : tensor(std::move(from)) {
    STD_TORCH_CHECK(tensor.dim() == 4, "key must have shape (B, H, T, D), got ", tensor.dim(), " dimensions");
    const int64_t* sizes = tensor.sizes().data();
    batch = sizes[0], count = sizes[1], rows = sizes[2], size = sizes[3];
    if (size > 1 && tensor.strides()[3] != 1) tensor = torch::stable::contiguous(tensor);
    const auto stride = [&](int dim) { return sizes[dim] > 1 ? tensor.strides()[dim] : 0; };
    batch_stride = stride(0), head_stride = stride(1), row_stride = stride(2);
  }

  const void* data() const { return tensor.const_data_ptr(); }
};

// The same, as a kernel takes it.
template <typename scalar_t>
struct HeadPointer {
  const scalar_t* data;
  int64_t batch_stride, head_stride, row_stride;

  __device__ __forceinline__ const scalar_t* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * batch_stride + head * head_stride + row * row_stride;
  }
  bool aligned_to(int64_t bytes) const {
    return RowPointer<scalar_t>{data, batch_stride}.aligned_to(bytes) &&
           RowPointer<scalar_t>{data, head_stride}.aligned_to(bytes) &&
           RowPointer<scalar_t>{data, row_stride}.aligned_to(bytes);
  }
};

// May rows of `columns` elements be moved in vectors of so many bytes?
template <typename scalar_t>
bool vectors_fit(int64_t bytes, int64_t columns, std::initializer_list<RowPointer<scalar_t>> operands) {
  bool fit = columns * sizeof(scalar_t) % bytes == 0;
  for (const auto& operand : operands) fit = fit && operand.aligned_to(bytes);
  return fit;
}

// So many elements of a tensor, counted in scalar_t, which may be narrower.
template <typename scalar_t>
int64_t count_in(const Tensor& tensor, int64_t elements) {
  return elements * static_cast<int64_t>(tensor.element_size() / sizeof(scalar_t));
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

#define VLMFAST_CUDA_LIBRARY vlmfast_native
#define VLMFAST_CUDA_KEY CUDA
#define VLMFAST_REGISTER_CUDA_OPS() VLMFAST_IMPLEMENT_OPS(vlmfast_native, CUDA)  // each cpu.cpp defines the ops

namespace vlmfast {

// Makes the device of a tensor the current one. All pointers of a launch come from here.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    static const std::vector<int> counts = [] {  // asked once: a query costs as much as a launch
      int devices = 0;
      cudaGetDeviceCount(&devices);
      std::vector<int> counts(devices);
      for (int i = 0; i < devices; ++i) cudaDeviceGetAttribute(&counts[i], cudaDevAttrMultiProcessorCount, i);
      return counts;
    }();
    return counts.at(device_);
  }

  // The strides count elements of scalar_t, which may be narrower than those of the tensor.
  template <typename scalar_t>
  RowPointer<scalar_t> input(const Rows& rows) const {
    return {static_cast<const scalar_t*>(rows.data()), count_in<scalar_t>(rows.tensor, rows.row_stride)};
  }

  template <typename scalar_t>
  ImagePointer<scalar_t> input(const Images& images) const {
    return {static_cast<const scalar_t*>(images.data()), count_in<scalar_t>(images.tensor, images.image_stride),
            count_in<scalar_t>(images.tensor, images.row_stride)};
  }

  template <typename scalar_t>
  HeadPointer<scalar_t> input(const Heads& heads) const {
    return {static_cast<const scalar_t*>(heads.data()), heads.batch_stride, heads.head_stride, heads.row_stride};
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

// function(scalar_t()) for the storage type of a dtype.
template <typename Function>
void with_dtype(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float());
    case Dtype::kFloat16:
      return function(__half());
    case Dtype::kBFloat16:
      return function(__nv_bfloat16());
    default:
      STD_TORCH_CHECK(false, "the tensors must be float32, float16 or bfloat16");
  }
}

// A float32 buffer of kernels on the current stream.
inline Tensor float_buffer(int64_t count, const Tensor& like) {
  const int64_t stride = 1;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_float32(), device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace vlmfast
