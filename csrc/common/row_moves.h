// Rows that are moved, on the CPU: the torch side of row_moves_kernels.h.
#pragma once

#include "common/common.h"
#include "common/cpu.h"
#include "common/row_moves_kernels.h"

namespace vlmfast {

// A (B, N, D) tensor of which each row is D adjacent elements, wherever it lies: copied once where they are not.
class Sequences {
 public:
  Sequences(const char* name, const Tensor& from) : tensor_(from) {
    STD_TORCH_CHECK(from.dim() == 3, name, " must have shape (B, N, C), got ", from.dim(), " dimensions");
    if (from.size(2) > 1 && from.stride(2) != 1) tensor_ = torch::stable::contiguous(from);
    data_ = static_cast<const char*>(tensor_.const_data_ptr());
    width_ = static_cast<int64_t>(tensor_.element_size());
    batch_bytes_ = tensor_.stride(0) * width_;
    row_bytes_ = tensor_.stride(1) * width_;
  }

  Sequences(const char* name, const Tensor& from, int64_t rows) : Sequences(name, from) {
    STD_TORCH_CHECK(this->rows() == rows, name, " must have shape (B, ", rows, ", C)");
  }

  int64_t batch() const { return tensor_.size(0); }
  int64_t rows() const { return tensor_.size(1); }
  int64_t size() const { return tensor_.size(2); }
  bool adjacent() const {
    return row_bytes_ == size() * width_;
  }  // whether each row begins where the one before it ends
  const char* at(int64_t sequence, int64_t row, int64_t element = 0) const {
    return data_ + sequence * batch_bytes_ + row * row_bytes_ + element * width_;
  }

 private:
  Tensor tensor_;
  const char* data_;
  int64_t width_, batch_bytes_, row_bytes_;
};

// From here on an output is written past the caches, which spares reading it first: 4096 x 2048 bfloat16 then take 0.44
// ms instead of 0.65 (EPYC, 32 MB of L3, one thread). A smaller one would still be in the cache when the next op reads
// it, and that loses more than the writer gains: at 8 MB the two together take 1.5 times as long.
constexpr int64_t kPastCaches = int64_t{12} << 20;

// A fresh contiguous tensor of the dtype of `like` whose rows of `row_size` elements are what `RowSums` says.
inline Tensor written_rows(const int64_t* sizes, int64_t dims, const Tensor& like, int64_t row_size,
                           const char* const* copied, const char* const* added = nullptr, double factor = 1) {
  static const RowMovesKernels kernels = at_cpu_level([](auto level) { return row_moves_kernels<level>(); });
  constexpr int64_t kLine = 64;
  Tensor output = allocate_output(sizes, dims, like);
  char* const y = static_cast<char*>(output.mutable_data_ptr());
  const int64_t elements = output.numel(), width = output.element_size();
  if (elements == 0) return output;
  const int64_t rows = elements / row_size;
  const bool aligned = reinterpret_cast<uintptr_t>(y) % kLine == 0 && row_size * width % kLine == 0;
  const RowSums args{dtype_of(output),
                     row_size,
                     copied,
                     added,
                     static_cast<float>(factor),
                     y,
                     aligned && elements * width >= kPastCaches};
  parallel_rows(rows, row_ranges(rows, row_size),
                [&](int64_t begin, int64_t end, int64_t) { kernels.write_rows(args, begin, end); });
  return output;
}

}  // namespace vlmfast
