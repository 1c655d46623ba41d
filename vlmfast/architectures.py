"""The GPUs that the kernels are compiled and tested for. It imports nothing: setup.py reads it without torch."""

# Each GPU by its compiler's name, with the bytes of shared memory that one program may use.
GPUS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
CUDA = tuple(int(name.removeprefix("sm_")) for name in GPUS if name.startswith("sm_"))  # compute capability, times ten
