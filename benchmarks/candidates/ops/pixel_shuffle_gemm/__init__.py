"""`pixel_shuffle_linear` as one matrix multiplication."""

from vlmfast.benchmarks.candidates.ops.pixel_shuffle_gemm.definition import pixel_shuffle_gemm

__all__ = ["pixel_shuffle_gemm"]
