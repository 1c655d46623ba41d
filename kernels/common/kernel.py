"""What a Triton kernel is compiled for: types, constants and what strides are multiples of; no count of anything.

Left to itself, the JIT compiles a kernel anew for each integer that is 1 or the first multiple of 16: in the middle of
serving, for a prompt whose length happens to be one, and within the capture of a CUDA graph, where it is an error. And
of a stride it knows no other divisor, so that rows of 72 elements would be read by two bytes at a time.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """Make a Triton kernel out of a function: compiled once for all numbers, whatever depends on a prompt.

    What vectors of a row need to know of its strides and sizes, the launch says by `alignment`.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is not tl.constexpr and not p.name.endswith("_ptr")]
    return triton.jit(do_not_specialize=numbers)(function)


def alignment(*numbers: int) -> int:
    """Find the largest power of two, up to 16, of which strides and sizes are multiples: a constant of the kernel.

    Ask only about what a model fixes, such as a row's size, and strides that are multiples of it.
    """
    return math.gcd(*numbers, 16)


@triton.jit
def aligned(number, ALIGNED: tl.constexpr):
    """Return ``number``, a multiple of ALIGNED, as arithmetic that shows the compiler so; a hint could be wrong."""
    return number // ALIGNED * ALIGNED


def limited(reason: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Say, under `kernel`, why one cannot have as many bytes in flight at every real shape as an H200 needs.

    Or why it takes more than four instructions for each of them. The report of `make static` shows it.
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.limited = reason
        return function

    return mark
