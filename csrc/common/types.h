// Types shared by the torch side and the CPU kernels. This header includes neither torch nor the C++ standard library:
// the kernels are compiled for AVX-512 too, and the linker could keep such a copy of an inline function for every
// machine.
#pragma once

#include <cstdint>

namespace vlmfast {

// Tensor dtypes: first the floating-point ones that kernels compute in, then those of masks and indices.
enum class Dtype { kFloat32, kFloat16, kBFloat16, kBool, kInt32, kInt64, kOther };

// A table of one function per floating-point dtype. VLMFAST_BY_DTYPE builds it from a template in csrc/*/*_kernels.cpp.
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

// The kernels process rows in blocks of kBlock floats, a whole number of vector registers in every instruction set.
// `padded` rounds a size up to whole blocks.
constexpr int kBlock = 32;
constexpr int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// The rounding order of an RMSNorm: "llama" rounds the normalised row to its dtype before it multiplies by the weight,
// "gemma" multiplies by 1 + weight and rounds once, "olmo" multiplies by the weight and rounds once.
enum class Variant { kLlama, kGemma, kOlmo };

// The activation of an MLP's gate.
enum class Activation { kSilu, kGeluTanh };

// The order of the tokens of a pixel shuffle: along the rows of the image, or down its columns.
enum class TokenOrder { kRow, kColumn };

// The value of a contextual token: its target plus the mean of the tokens merged into it, or the mean of them all.
enum class Merge { kReference, kMean };

// The longest head that rotary embedding takes: one stays in the registers of a few threads.
constexpr int kMaxHeadDim = 512;

// Long sums are accumulated in levels, each of which adds kSumStep sums of the level below. The rounding error then
// grows with the logarithm of the number of terms.
constexpr int kSumLevels = 3;
constexpr int kSumStep = 16;

// The number of floats that one thread needs for the partial sums of a weight's gradient: every level, zeroed before
// the first row, with the elements in the order in which the kernel loads blocks.
constexpr int64_t partial_size(int64_t size) { return padded(size) * kSumLevels; }

// Adds up `count` consecutive partial sums into `size` elements of the call's dtype.
using SumPartials = void(int64_t size, const float* partials, int64_t count, void* sums);

// The instruction sets that each csrc/*/*_kernels.cpp is compiled for: the x86-64 microarchitecture levels, and v4 with
// AVX512-BF16 if its header says `kHasBf16Level`, which setup.py reads. It compiles levels up to VLMFAST_HIGHEST_LEVEL;
// other architectures have only the baseline.
enum class CpuLevel { baseline, v3, v4, v4_bf16 };
template <class Kernels>
constexpr bool kHasBf16Level = false;

// Returns the kernels of a family compiled for one level. Each *_kernels.cpp specialises it for its own struct.
template <class Kernels, CpuLevel level>
Kernels kernels_at();

}  // namespace vlmfast
