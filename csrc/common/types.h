// The words that the torch side and the kernels share. Free of torch and of the standard library, because the kernels
// include it: an inline function compiled there for AVX-512 could be the one that the linker keeps for every machine.
#pragma once

#include <cstdint>

namespace vlmfast {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// The order of the arithmetic: "llama" rounds before the weight, "gemma" multiplies by 1 + weight and rounds once.
enum class Variant { kLlama, kGemma };

// How the tokens of a pixel shuffle are numbered: along the rows of the image, or down its columns.
enum class TokenOrder { kRow, kColumn };

// What a contextual token is: its target plus the mean of what is merged into it, or the mean of both.
enum class Merge { kReference, kMean };

// What a thread has summed of the gradient of a weight: float32, zero at first, in the order of the kernel's registers.
// Each level holds sums of 16 of the level below, so that the error grows with the logarithm of the rows.
constexpr int kPartialLevels = 3;
constexpr int kPartialStep = 16;
constexpr int64_t partial_size(int64_t size) { return (size + 31) / 32 * 32 * kPartialLevels; }

// The instruction sets that csrc/*_kernels.cpp are compiled for: the levels of the x86-64 ABI, and the fourth with the
// conversions to bfloat16. Other processors have the baseline alone.
enum class CpuLevel { baseline, v3, v4, v4_bf16 };

}  // namespace vlmfast
