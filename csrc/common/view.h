// Tensors as kernels see them. One statement declares, checks and binds the shape and dtype of an argument.
//
//   Size batch("batch"), tokens("tokens"), hidden("hidden"), visual("visual");
//   FloatDtype dtype;
//   const View x("hidden_states", hidden_states, {{batch, tokens}, hidden}, dtype);
//   const View mask("mask", mask_tensor, {{batch, tokens}}, Dtype::kBool);
//   const View embeds("visual_embeds", visual_embeds, {visual, hidden}, dtype);
//
// The first tensor that uses a size binds it, and later tensors must match. Sizes in braces are collapsed into one
// dimension of the view. Errors name the argument, the shape that was expected and the shape that was given:
//   visual_embeds must have shape (visual, hidden) = (visual, 64), got (5, 65)
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <string>

#include "common/types.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has it under the older name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace vlmfast {

using torch::stable::Tensor;

// ---- dtypes ----

struct DtypeInfo {
  const char* name;
  int64_t width;             // bytes of an element
  int32_t (*shim_number)();  // the number of the dtype in torch's C shim
};

inline constexpr DtypeInfo kDtypes[] = {{"float32", 4, aoti_torch_dtype_float32},
                                        {"float16", 2, aoti_torch_dtype_float16},
                                        {"bfloat16", 2, aoti_torch_dtype_bfloat16},
                                        {"bool", 1, aoti_torch_dtype_bool},
                                        {"int32", 4, aoti_torch_dtype_int32},
                                        {"int64", 8, aoti_torch_dtype_int64},
                                        {"another dtype", 0, nullptr}};

constexpr const DtypeInfo& info(Dtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

// Returns the dtype of a tensor, bfloat16 being tried first. Tensor::scalar_type() is slower: it asks the shim for the
// number of one dtype after another until one matches.
inline Dtype dtype_of(const Tensor& tensor) {
  int32_t number;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  if (number == aoti_torch_dtype_bfloat16()) return Dtype::kBFloat16;
  for (Dtype dtype{}; dtype < Dtype::kOther; dtype = static_cast<Dtype>(static_cast<int>(dtype) + 1)) {
    if (number == info(dtype).shim_number()) return dtype;
  }
  return Dtype::kOther;
}

// A floating-point dtype that several tensors of a call share. The first one binds it.
class FloatDtype {
 public:
  operator Dtype() const { return dtype_; }

  void bind(const char* name, Dtype found) {
    STD_TORCH_CHECK(found <= Dtype::kBFloat16, name, " must be float32, float16 or bfloat16, got ", info(found).name);
    STD_TORCH_CHECK(owner_ == nullptr || found == dtype_, name, " must be ", info(dtype_).name, ", the dtype of ",
                    owner_, ", got ", info(found).name);
    if (owner_ != nullptr) return;
    owner_ = name;
    dtype_ = found;
  }

 private:
  const char* owner_ = nullptr;
  Dtype dtype_ = Dtype::kOther;
};

// ---- sizes ----

// The most that kernels count in 32 bits, and the most that they may also double.
constexpr int64_t kMostInt = (int64_t{1} << 31) - 1, kHalfInt = kMostInt / 2;

// A size that several tensors of a call share: given as a number, or bound by the first tensor.
class Size {
 public:
  explicit Size(const char* name, int64_t value = kUnbound, int64_t least = 0, int64_t most = kUnlimited)
      : name_(name), value_(value), least_(least), most_(most) {}

  Size at_least(int64_t least) const { return Size(name_, value_, least, most_); }
  Size at_most(int64_t most) const { return Size(name_, value_, least_, most); }

  operator int64_t() const { return value_; }

  bool bind(int64_t found) {
    if (value_ != kUnbound) return value_ == found;
    if (found < least_ || found > most_) return false;
    value_ = found;
    return true;
  }

  // For error messages: the name, the value (the name if unbound), and the bounds (empty if bound).
  std::string name() const { return name_; }
  std::string value() const { return value_ == kUnbound ? name_ : std::to_string(value_); }
  std::string bounds() const {
    if (value_ != kUnbound) return "";
    return (least_ > 0 ? ", " + name() + " >= " + std::to_string(least_) : "") +
           (most_ < kUnlimited ? ", " + name() + " <= " + std::to_string(most_) : "");
  }

 private:
  static constexpr int64_t kUnbound = -1, kUnlimited = std::numeric_limits<int64_t>::max();
  const char* name_;
  int64_t value_, least_, most_;
};

// Any number of leading sizes that several tensors of a call share, bound by the first one. Converts to their product.
class Leading {
 public:
  operator int64_t() const { return count_; }

  bool bind(const int64_t* sizes, int64_t dims) {
    if (sizes_ == nullptr) {
      sizes_ = sizes;
      dims_ = dims;
      for (const int64_t size : *this) count_ *= size;
    }
    return std::equal(sizes, sizes + dims, begin(), end());
  }

  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + dims_; }

 private:
  const int64_t* sizes_ = nullptr;  // owned by the first tensor, which outlives the call
  int64_t dims_ = 0, count_ = 1;
};

// A dimension of a view: one size, two collapsed sizes, or all leading sizes.
struct Dim {
  Size* sizes[2] = {};
  Leading* leading = nullptr;

  Dim(Size& size) : sizes{&size} {}
  Dim(Size& outer, Size& inner) : sizes{&outer, &inner} {}
  Dim(Leading& all) : leading(&all) {}

  // Returns how many dimensions of the tensor it names; all leading ones count as none.
  int64_t named() const { return leading != nullptr ? 0 : sizes[1] != nullptr ? 2 : 1; }

  bool bind(const int64_t* found, int64_t dims) const {
    if (leading != nullptr) return leading->bind(found, dims);
    for (int64_t dim = 0; dim < dims; ++dim) {
      if (!sizes[dim]->bind(found[dim])) return false;
    }
    return true;
  }
};

// Refuses an argument outside [least, most].
inline void check_within(const char* name, int64_t value, int64_t least, int64_t most) {
  STD_TORCH_CHECK(least <= value && value <= most, name, " must be within ", least, " and ", most, ", got ", value);
}

// ---- views ----

namespace detail {

inline void bind_dtype(const char* name, Dtype found, FloatDtype& dtype) { dtype.bind(name, found); }
inline void bind_dtype(const char* name, Dtype found, Dtype dtype) {
  STD_TORCH_CHECK(found == dtype, name, " must be ", info(dtype).name, ", got ", info(found).name);
}

[[noreturn]] inline void refuse_shape(const char* name, const Tensor& tensor, const Dim* shape, int rank) {
  std::string names, values, bounds, got;
  const auto add = [](std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; };
  for (const Dim* dim = shape; dim < shape + rank; ++dim) {
    if (dim->leading != nullptr) {
      add(names, "...");
      if (dim->leading->begin() == nullptr) add(values, "...");
      for (const int64_t size : *dim->leading) add(values, std::to_string(size));
    }
    for (const Size* size : dim->sizes) {
      if (size == nullptr) continue;
      add(names, size->name());
      add(values, size->value());
      bounds += size->bounds();
    }
  }
  for (const int64_t size : tensor.sizes()) add(got, std::to_string(size));
  const std::string expected = values == names ? "" : " = (" + values + ")";
  STD_TORCH_CHECK(false, name, " must have shape (", names, ")", expected, bounds, ", got (", got, ")");
  std::abort();
}

// Collapses the dimensions from `begin` to `end` into one and writes its stride: 0 if it has one element, because no
// kernel then takes a step. Returns false if the dimensions have no common stride.
inline bool collapse(const int64_t* sizes, const int64_t* strides, int64_t begin, int64_t end, int64_t& stride) {
  int64_t inner = 1;
  stride = 0;
  for (int64_t dim = end; dim-- > begin;) {
    if (sizes[dim] == 1) continue;
    if (inner == 1) stride = strides[dim];
    if (strides[dim] != stride * inner) return false;
    inner *= sizes[dim];
  }
  return true;
}

// Binds the sizes of a tensor and writes the sizes and strides of its view. Returns false if the tensor has no such
// view, because collapsed dimensions have no common stride or the elements of the last dimension are not adjacent.
template <int rank>
bool bind_shape(const char* name, const Tensor& tensor, const Dim (&shape)[rank], int64_t (&view_sizes)[rank],
                int64_t (&view_strides)[rank]) {
  const int64_t dims = tensor.dim();
  int64_t *sizes, *strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  int64_t named = 0;
  for (int i = 0; i < rank; ++i) named += shape[i].named();
  const int64_t leading = shape[0].leading != nullptr ? dims - named : 0;
  if (leading < 0 || leading + named != dims) refuse_shape(name, tensor, shape, rank);
  bool fits = true;
  int64_t begin = 0, elements = 1;
  for (int i = 0; i < rank; ++i) {
    const int64_t end = begin + (shape[i].leading != nullptr ? leading : shape[i].named());
    if (!shape[i].bind(sizes + begin, end - begin)) refuse_shape(name, tensor, shape, rank);
    view_sizes[i] = 1;
    for (int64_t dim = begin; dim < end; ++dim) view_sizes[i] *= sizes[dim];
    fits = collapse(sizes, strides, begin, end, view_strides[i]) && fits;
    elements *= view_sizes[i];
    begin = end;
  }
  return elements == 0 || (fits && (view_sizes[rank - 1] == 1 || view_strides[rank - 1] == 1));
}

}  // namespace detail

// A tensor, or a missing optional one, seen as `rank` dimensions whose last one is contiguous. The tensor is read in
// place if its strides allow it, and copied once if they do not.
template <int rank>
class View {
 public:
  // The view of a missing tensor converts to false and has null data and zero strides. AnyDtype is Dtype or FloatDtype.
  template <class MaybeTensor, class AnyDtype>
  View(const char* name, const MaybeTensor& tensor, const Dim (&shape)[rank], AnyDtype&& dtype) {
    if constexpr (std::is_same_v<MaybeTensor, Tensor>) {
      bind(name, tensor, shape, dtype);
    } else if (tensor.has_value()) {
      bind(name, *tensor, shape, dtype);
    }
  }
  View() = default;

  explicit operator bool() const { return data_ != nullptr; }

  const void* data() const { return data_; }
  // Returns the address of an element. Trailing indices that are left out are 0.
  template <class T = char, class... Index>
  const T* at(Index... index) const {
    static_assert(sizeof...(index) <= rank);
    const int64_t indices[] = {index..., 0};
    const int64_t elements = std::inner_product(indices, indices + sizeof...(index), strides_, int64_t{0});
    return reinterpret_cast<const T*>(static_cast<const char*>(data_) + elements * width());
  }

  int64_t size(int dim) const { return sizes_[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }  // in elements
  int64_t width() const { return info(dtype_).width; }     // bytes of an element
  Dtype dtype() const { return dtype_; }

  int64_t numel() const {
    int64_t elements = 1;
    for (const int64_t size : sizes_) elements *= size;
    return elements;
  }

 private:
  template <class AnyDtype>
  void bind(const char* name, const Tensor& tensor, const Dim (&shape)[rank], AnyDtype& dtype) {
    dtype_ = dtype_of(tensor);
    detail::bind_dtype(name, dtype_, dtype);
    if (detail::bind_shape(name, tensor, shape, sizes_, strides_)) {
      data_ = tensor.const_data_ptr();
      return;
    }
    copy_ = torch::stable::contiguous(tensor);
    data_ = copy_->const_data_ptr();
    int64_t stride = 1;
    for (int dim = rank; dim-- > 0; stride *= sizes_[dim]) strides_[dim] = stride;
  }

  const void* data_ = nullptr;  // owned by the tensor, which outlives the call, or by the copy
  int64_t sizes_[rank] = {}, strides_[rank] = {};
  Dtype dtype_ = Dtype::kOther;
  std::optional<Tensor> copy_;
};

}  // namespace vlmfast
