// What the ops share on the torch side: arguments, layouts, allocation. On torch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "common/types.h"
#include "common/view.h"

namespace vlmfast {

using torch::headeronly::IntHeaderOnlyArrayRef;

inline Variant parse_variant(std::string_view name) {
  if (name == "llama") return Variant::kLlama;
  if (name == "gemma") return Variant::kGemma;
  STD_TORCH_CHECK(name == "olmo", "variant must be one of 'llama', 'gemma', 'olmo', got '", name, "'");
  return Variant::kOlmo;
}

inline TokenOrder parse_order(std::string_view name) {
  STD_TORCH_CHECK(name == "row" || name == "column", "order must be one of 'row', 'column', got '", name, "'");
  return name == "row" ? TokenOrder::kRow : TokenOrder::kColumn;
}

inline Merge parse_merge(std::string_view name) {
  STD_TORCH_CHECK(name == "reference" || name == "mean", "merge must be one of 'reference', 'mean', got '", name, "'");
  return name == "reference" ? Merge::kReference : Merge::kMean;
}

// A fresh contiguous tensor on the device of `like`, of a dtype in the shim's numbers (aoti_torch_dtype_int64() ...).
// The C shim allocates without the boxed call into the dispatcher that torch::stable::empty_like makes.
inline Tensor allocate(const int64_t* sizes, int64_t dims, const Tensor& like, int32_t dtype) {
  constexpr int64_t kMaxDims = 64;  // torch's own limit
  STD_TORCH_CHECK(dims <= kMaxDims, "tensors must have at most ", kMaxDims, " dimensions, got ", dims);
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t dim = dims; dim-- > 0; stride *= sizes[dim] > 0 ? sizes[dim] : 1) strides[dim] = stride;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor allocate(IntHeaderOnlyArrayRef sizes, const Tensor& like, Dtype dtype) {
  return allocate(sizes.data(), static_cast<int64_t>(sizes.size()), like, info(dtype).shim_number());
}

inline Tensor allocate(const int64_t* sizes, int64_t dims, const Tensor& like) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return allocate(sizes, dims, like, dtype);
}

inline Tensor allocate_like(const Tensor& like) { return allocate(like.sizes().data(), like.dim(), like); }

// A (..., D) tensor as rows of D adjacent elements, one row stride apart.
struct Rows {
  Tensor tensor;           // owns the data
  int64_t count = 1;       // the product of the leading sizes
  int64_t size = 0;        // D
  int64_t row_stride = 0;  // in elements; 0 where one row is expanded

  // Read in place where the leading dimensions collapse to one stride, copied once otherwise.
  explicit Rows(Tensor from) : tensor(std::move(from)) {
    const int64_t dims = tensor.dim();
    STD_TORCH_CHECK(dims > 0, "the tensors must have at least one dimension, got a scalar");
    const int64_t* sizes = tensor.sizes().data();
    size = sizes[dims - 1];
    for (int64_t dim = 0; dim < dims - 1; ++dim) count *= sizes[dim];
    if (!collapses(sizes, tensor.strides().data(), dims)) {
      tensor = torch::stable::contiguous(tensor);
      row_stride = size;
    }
  }

  const void* data() const { return tensor.const_data_ptr(); }

 private:
  bool collapses(const int64_t* sizes, const int64_t* strides, int64_t dims) {
    row_stride = size;
    if (count * size == 0) return true;  // nothing to read
    if (size > 1 && strides[dims - 1] != 1) return false;
    int64_t rows_below = 1;
    for (int64_t dim = dims - 1; dim-- > 0;) {
      if (sizes[dim] == 1) continue;
      if (rows_below == 1) row_stride = strides[dim];
      if (strides[dim] != row_stride * rows_below) return false;
      rows_below *= sizes[dim];
    }
    return true;
  }
};

// A (B, N, C) tensor as images of N rows of C adjacent elements: read in place, whatever the strides of the images and
// of the rows; copied once where elements are not adjacent.
struct Images {
  Tensor tensor;  // owns the data
  int64_t count, rows, size;
  int64_t image_stride = 0, row_stride = 0;  // in elements

  explicit Images(Tensor from) : tensor(std::move(from)) {
    STD_TORCH_CHECK(tensor.dim() == 3, "x must have shape (B, N, C), got ", tensor.dim(), " dimensions");
    const int64_t* sizes = tensor.sizes().data();
    count = sizes[0], rows = sizes[1], size = sizes[2];
    if (size > 1 && tensor.strides()[2] != 1) tensor = torch::stable::contiguous(tensor);
    if (count > 1) image_stride = tensor.strides()[0];  // 0 where no kernel takes a step
    if (rows > 1) row_stride = tensor.strides()[1];
  }

  const void* data() const { return tensor.const_data_ptr(); }
};

// Refuse what a kernel would read or write out of bounds on. The definitions in vlmfast/ops check the rest, with better
// messages.
inline void check_twin(const char* name, const Rows& rows, const Rows& x) {
  STD_TORCH_CHECK(rows.count == x.count && rows.size == x.size, name, " must have the shape of x");
  STD_TORCH_CHECK(dtype_of(rows.tensor) == dtype_of(x.tensor), name, " must have the dtype of x");
}

inline void check_weight(const Rows& weight, const Rows& x) {
  STD_TORCH_CHECK(weight.count == 1 && weight.size == x.size, "weight must have shape (", x.size,
                  ",), the last size of x");
  STD_TORCH_CHECK(dtype_of(weight.tensor) == dtype_of(x.tensor), "weight must have the dtype of x");
}

inline std::optional<Rows> checked_weight(const std::optional<Tensor>& tensor, const Rows& x) {
  std::optional<Rows> weight;
  if (tensor) check_weight(weight.emplace(*tensor), x);
  return weight;
}

// A word as an argument of a boxed function. The conversion to std::string of torch's headers (2.10 to 2.13) leaks the
// string that it makes.
template <auto parse>
struct WordArgument {
  static auto call(StableIValue value, uint64_t, bool) {
    const struct Owner {
      StringHandle handle;
      ~Owner() { torch_delete_string(handle); }
    } owner{torch::stable::detail::to<StringHandle>(value)};
    const char* data;
    size_t length;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(owner.handle, &data));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(owner.handle, &length));
    return parse({data, length});
  }
};

}  // namespace vlmfast

// An op is one line of its family's ops.h, from which its definition and its implementations follow: VLMFAST_OPS there
// is a list of (name, the rest of the schema), and each op is the function of this name.
#define VLMFAST_DEFINE_OP(name, signature) m.def(#name signature);
#define VLMFAST_IMPLEMENT_OP(name, signature) m.impl(#name, TORCH_BOX(&vlmfast::name));
#define VLMFAST_DEFINE_OPS(library) \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) { VLMFAST_OPS(VLMFAST_DEFINE_OP) }
#define VLMFAST_IMPLEMENT_OPS(library, key) \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) { VLMFAST_OPS(VLMFAST_IMPLEMENT_OP) }

template <>
struct torch::stable::detail::ToImpl<vlmfast::Variant> : vlmfast::WordArgument<vlmfast::parse_variant> {};
template <>
struct torch::stable::detail::ToImpl<vlmfast::TokenOrder> : vlmfast::WordArgument<vlmfast::parse_order> {};
template <>
struct torch::stable::detail::ToImpl<vlmfast::Merge> : vlmfast::WordArgument<vlmfast::parse_merge> {};
