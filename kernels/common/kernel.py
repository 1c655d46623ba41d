"""Controls what Triton kernels are specialised for: dtypes, constants and the alignment of strides, but no sizes.

By default, the JIT recompiles a kernel when an integer argument becomes 1 or a multiple of 16. With a size that depends
on the prompt that happens in the middle of serving, or during the capture of a CUDA graph, where it is an error. The
JIT also knows no other divisor of a stride than 16, so rows of 72 elements would be read two bytes at a time.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """Make a Triton kernel that is not specialised for the values of its integer arguments.

    A launch passes the alignment of strides and sizes, which vectorised accesses need, as a constant: see `alignment`.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is not tl.constexpr and not p.name.endswith("_ptr")]
    return triton.jit(do_not_specialize=numbers)(function)


def alignment(*numbers: int) -> int:
    """Return the largest power of two up to 16 that divides all strides and sizes: a constant of the kernel.

    Pass only numbers that a model fixes, such as the size of a row and strides that are multiples of it; each new
    result compiles the kernel again.
    """
    return math.gcd(*numbers, 16)


@triton.jit
def aligned(number, ALIGNED: tl.constexpr):
    """Return ``number``, a multiple of ALIGNED, by arithmetic from which the compiler infers so.

    Unlike a compiler hint it cannot be false.
    """
    return number // ALIGNED * ALIGNED


def limited(reason: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Record why a kernel falls short of the static limits at some real shape; goes under `kernel`.

    The limits are the bytes in flight that an H200 needs and at most four instructions per byte. The report of `make
    static` shows the reason.
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.limited = reason
        return function

    return mark
