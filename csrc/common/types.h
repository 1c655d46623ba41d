// The words that the torch side and the kernels share. They need neither torch nor the standard library, of which an
// inline function compiled in a kernel for AVX-512 could be the one that the linker keeps for every machine.
#pragma once

#include <cstdint>

namespace vlmfast {

// The dtypes of tensors: those of the arithmetic first, then masks and numbers.
enum class Dtype { kFloat32, kFloat16, kBFloat16, kBool, kInt32, kInt64, kOther };

// One function for each dtype of the arithmetic; VLMFAST_BY_DTYPE makes it of a template in csrc/*/*_kernels.cpp.
template <class Function>
struct ByDtype {
  Function* functions[3];
  Function* operator[](Dtype dtype) const { return functions[static_cast<int>(dtype)]; }
};
#define VLMFAST_BY_DTYPE(kernel, ...)                                                               \
  {                                                                                                 \
    {                                                                                               \
      kernel<float, ##__VA_ARGS__>, kernel<Float16, ##__VA_ARGS__>, kernel<BFloat16, ##__VA_ARGS__> \
    }                                                                                               \
  }

// Floats that the kernels work on at a time, and a size rounded up to so many: a multiple of every level's registers.
constexpr int kBlock = 32;
constexpr int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// The order of the arithmetic: "llama" rounds before the weight, "gemma" multiplies by 1 + weight and rounds once, "olmo"
// multiplies by the weight and rounds once.
enum class Variant { kLlama, kGemma, kOlmo };

// What a gate of an MLP goes through.
enum class Activation { kSilu, kGeluTanh };

// How the tokens of a pixel shuffle are numbered: along the rows of the image, or down its columns.
enum class TokenOrder { kRow, kColumn };

// What a contextual token is: its target plus the mean of what is merged into it, or the mean of both.
enum class Merge { kReference, kMean };

// Long sums are taken in levels: each holds sums of kSumStep terms of the level below, so that the error grows with the
// logarithm of their number.
constexpr int kSumLevels = 3;
constexpr int kSumStep = 16;

// The partial sums of a weight's gradient that one thread takes have so many floats: all levels, zero at first, in the
// order of the kernel's registers.
constexpr int64_t partial_size(int64_t size) { return padded(size) * kSumLevels; }

// Adds up `count` partial sums, which lie one after the other, into `size` elements of the call's dtype.
using SumPartials = void(int64_t size, const float* partials, int64_t count, void* sums);

// The instruction sets that csrc/*_kernels.cpp are compiled for: the levels of the x86-64 ABI, and the fourth with the
// conversions to bfloat16. Other processors have the baseline alone.
enum class CpuLevel { baseline, v3, v4, v4_bf16 };

// The kernels of a family as compiled for a level: each *_kernels.cpp defines it for its own struct of functions.
template <class Kernels, CpuLevel level>
Kernels kernels_at();

}  // namespace vlmfast
