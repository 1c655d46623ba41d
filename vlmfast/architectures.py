"""The GPUs that the kernels are compiled and tested for. Nothing is imported: setup.py reads this without torch."""

# By the compilers' name of each: the bytes of shared memory that one program may have.
GPUS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUDA = tuple(int(name.removeprefix("sm_")) for name in GPUS if name.startswith("sm_"))  # compute capability, times ten
