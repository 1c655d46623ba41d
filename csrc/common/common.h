// Shared by the torch side of all ops: allocation, string arguments and op registration. Uses only torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>

#include "common/types.h"
#include "common/view.h"

namespace vlmfast {

using torch::headeronly::IntHeaderOnlyArrayRef;

// Allocates an uninitialised contiguous tensor on the device of `like`. It calls the C shim directly, because
// torch::stable::empty_like goes through a boxed dispatcher call.
inline Tensor allocate(IntHeaderOnlyArrayRef sizes, const Tensor& like, Dtype dtype) {
  constexpr int64_t kMaxDims = 64;  // torch's own limit
  const int64_t dims = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dims <= kMaxDims, "tensors must have at most ", kMaxDims, " dimensions, got ", dims);
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t dim = dims; dim-- > 0; stride *= sizes[dim] > 0 ? sizes[dim] : 1) strides[dim] = stride;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides, info(dtype).shim_number(),
                                                         device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& like) { return allocate(like.sizes(), like, dtype_of(like)); }

// Each table holds the name of a string argument, then its allowed values in the order of the enumerators.
inline constexpr std::string_view kVariant[] = {"variant", "llama", "gemma", "olmo"};
inline constexpr std::string_view kActivation[] = {"activation", "silu", "gelu_tanh"};
inline constexpr std::string_view kTokenOrder[] = {"order", "row", "column"};
inline constexpr std::string_view kMerge[] = {"merge", "reference", "mean"};

// Unboxes a string argument into an enumeration. torch's own conversion to std::string (2.10 to 2.13) would leak the
// string handle.
template <class Word, const auto& words>
struct WordArgument {
  static Word call(StableIValue value, uint64_t, bool) {
    const struct Owner {
      StringHandle handle;
      ~Owner() { torch_delete_string(handle); }
    } owner{torch::stable::detail::to<StringHandle>(value)};
    const char* data;
    size_t length;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(owner.handle, &data));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(owner.handle, &length));
    const std::string_view given(data, length);
    const auto first = std::next(std::begin(words)), found = std::find(first, std::end(words), given);
    if (found == std::end(words)) {
      std::string known;
      for (auto word = first; word != std::end(words); ++word)
        known.append(word > first ? ", '" : "'").append(*word).append("'");
      STD_TORCH_CHECK(false, words[0], " must be one of ", known, ", got '", given, "'");
    }
    return static_cast<Word>(found - first);
  }
};

}  // namespace vlmfast

// Each op is one entry of the list VLMFAST_OPS in its family's ops.h: its name and the rest of its schema. These macros
// derive the definition from it, and the implementation, which is the function of that name in namespace vlmfast.
#define VLMFAST_DEFINE_OP(name, signature) m.def(#name signature);
#define VLMFAST_IMPLEMENT_OP(name, signature) m.impl(#name, TORCH_BOX(&vlmfast::name));
#define VLMFAST_DEFINE_OPS(library) \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) { VLMFAST_OPS(VLMFAST_DEFINE_OP) }
#define VLMFAST_IMPLEMENT_OPS(library, key) \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) { VLMFAST_OPS(VLMFAST_IMPLEMENT_OP) }

template <>
struct torch::stable::detail::ToImpl<vlmfast::Variant> : vlmfast::WordArgument<vlmfast::Variant, vlmfast::kVariant> {};
template <>
struct torch::stable::detail::ToImpl<vlmfast::Activation>
    : vlmfast::WordArgument<vlmfast::Activation, vlmfast::kActivation> {};
template <>
struct torch::stable::detail::ToImpl<vlmfast::TokenOrder>
    : vlmfast::WordArgument<vlmfast::TokenOrder, vlmfast::kTokenOrder> {};
template <>
struct torch::stable::detail::ToImpl<vlmfast::Merge> : vlmfast::WordArgument<vlmfast::Merge, vlmfast::kMerge> {};
