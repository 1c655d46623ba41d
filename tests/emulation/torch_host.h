// The emulated half of csrc/common/cuda_torch.h: tensors of the CPU, one stream, and kernels that may only touch what their
// launcher has asked a pointer for. The ops live in a namespace of their own, beside the compiled extension's.
#pragma once

#define VLMFAST_CUDA_KEY CPU
#ifndef VLMFAST_CUDA_LIBRARY
#define VLMFAST_CUDA_LIBRARY vlmfast_emulated
#endif

extern "C" void vlmfast_emulation_allow(void* begin, int64_t rows, int64_t row_bytes, int64_t row_pitch, int writable);
extern "C" void vlmfast_emulation_forbid_all();

namespace vlmfast {

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) { vlmfast_emulation_forbid_all(); }
  ~DeviceScope() { vlmfast_emulation_forbid_all(); }

  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 1; }  // few, so that persistent kernels have to loop

  template <typename scalar_t>
  RowPointer<scalar_t> input(const Rows& rows) const {
    const auto size = static_cast<int64_t>(rows.tensor.element_size());
    vlmfast_emulation_allow(const_cast<void*>(rows.data()), rows.count, rows.size * size, rows.row_stride * size, 0);
    return {static_cast<const scalar_t*>(rows.data()), count_in<scalar_t>(rows.tensor, rows.row_stride)};
  }

  template <typename scalar_t>
  ImagePointer<scalar_t> input(const Images& images) const {
    const auto size = static_cast<int64_t>(images.tensor.element_size());
    char* const data = static_cast<char*>(const_cast<void*>(images.data()));
    for (int64_t image = 0; image < images.count; ++image) {
      vlmfast_emulation_allow(data + image * images.image_stride * size, images.rows, images.size * size,
                              images.row_stride * size, 0);
    }
    return {static_cast<const scalar_t*>(images.data()), count_in<scalar_t>(images.tensor, images.image_stride),
            count_in<scalar_t>(images.tensor, images.row_stride)};
  }

  template <typename scalar_t>
  HeadPointer<scalar_t> input(const Heads& heads) const {
    const auto size = static_cast<int64_t>(heads.tensor.element_size());
    char* const data = static_cast<char*>(const_cast<void*>(heads.data()));
    for (int64_t i = 0; i < heads.batch * heads.count; ++i) {
      const int64_t offset = i / heads.count * heads.batch_stride + i % heads.count * heads.head_stride;
      vlmfast_emulation_allow(data + offset * size, heads.rows, heads.size * size, heads.row_stride * size, 0);
    }
    return {static_cast<const scalar_t*>(heads.data()), heads.batch_stride, heads.head_stride, heads.row_stride};
  }

  // Poisoned: an element that no kernel writes is NaN.
  template <typename scalar_t>
  scalar_t* output(const Tensor& tensor) const {
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    void* const data = tensor.mutable_data_ptr();
    memset(data, 0xff, bytes);
    vlmfast_emulation_allow(data, 1, bytes, bytes, 1);
    return static_cast<scalar_t*>(data);
  }
};

}  // namespace vlmfast
