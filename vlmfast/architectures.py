"""The GPUs that the kernels are compiled and tested for, and how. It imports nothing, so that setup.py can read it."""

# Each GPU by its compiler's name, with the bytes of shared memory that one program may use.
GPUS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUDA = tuple(int(name.removeprefix("sm_")) for name in GPUS if name.startswith("sm_"))  # compute capability, times ten

# Flags of the C++ compiler and of nvcc. torch 2.10 is the first release whose stable ABI has parallel_for and strings.
CXX_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000")
NVCC_FLAGS = (*CXX_FLAGS, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden")
