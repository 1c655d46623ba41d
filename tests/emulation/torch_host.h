// The emulated half of csrc/common/cuda_torch.h: CPU tensors, one stream, and kernels that may access only memory for
// which their launcher has requested a pointer. The ops have another namespace than those of the compiled extension.
#pragma once

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
  int multiprocessors() const { return emulation::gpu.multiprocessors; }

  // Allows a kernel to read the rows of a view, one by one.
  template <typename scalar_t, int rank>
  Input<scalar_t, rank> input(const View<rank>& view) const {
    const int64_t width = view.width(), row_bytes = view.size(rank - 1) * width;
    const int64_t rows = rank > 1 ? view.size(rank - 2) : 1;
    const int64_t pitch = rank > 1 ? view.stride(rank - 2) * width : row_bytes;
    int64_t groups = 1;
    for (int dim = 0; dim < rank - 2; ++dim) groups *= view.size(dim);
    for (int64_t group = 0; group < groups; ++group) {
      int64_t elements = 0;
      for (int64_t dim = rank - 3, rest = group; dim >= 0; rest /= view.size(dim--)) {
        elements += rest % view.size(dim) * view.stride(dim);
      }
      char* const data = static_cast<char*>(const_cast<void*>(view.data())) + elements * width;
      vlmfast_emulation_allow(data, rows, row_bytes, pitch, 0);
    }
    return as_input<scalar_t>(view);
  }

  // Filled with NaN, so that an element that no kernel writes is noticed.
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
