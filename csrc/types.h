// The words that the torch side and the kernels share. Free of torch and of the standard library, because the kernels
// include it: an inline function compiled there for AVX-512 could be the one that the linker keeps for every machine.
#pragma once

namespace vlmfast {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// The order of the arithmetic: "llama" rounds before the weight, "gemma" multiplies by 1 + weight and rounds once.
enum class Variant { kLlama, kGemma };

// The instruction sets that csrc/*_kernels.cpp are compiled for: the levels of the x86-64 ABI, and the fourth with the
// conversions to bfloat16. Other processors have the baseline alone.
enum class CpuLevel { baseline, v3, v4, v4_bf16 };

}  // namespace vlmfast
