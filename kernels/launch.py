"""What every Triton launcher needs: a view of rows, a tile of them, the right device, the reason why it cannot run."""

import contextlib
import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vlmfast.backends import PLAIN, subclass

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton 3.10 changes the default. Contracting a multiplication and an addition only drops a rounding, and no
# rounding that Hugging Face makes stands between a multiplication and an addition of ours.
FP_FUSION = {"enable_fp_fusion": True}

# Triton compiles an assertion only in debug mode, which would also check every 32-bit operation for overflow.
ASSERTING = {"debug": True, "sanitize_overflow": False}

MAX_EXTENT = 2**31 - 2**14  # rows and columns are counted in 32 bits, beyond the end by a block; offsets in 64


@dataclass(frozen=True)
class Tile:
    """What one program holds in registers: ``rows`` rows of ``columns`` (a power of two), and the warps it has."""

    rows: int
    columns: int
    warps: int


def row_tile(hidden: int) -> Tile:
    """16 elements per thread: two 16-byte loads in flight for bfloat16. Narrow rows share a program."""
    columns = min(4096, next_power_of_two(max(hidden, 1)))
    return Tile(rows=min(256, 4096 // columns), columns=columns, warps=8)


def device_unsupported(x: Tensor) -> str | None:
    """Why Triton cannot run on the device of ``x``, or None."""
    if type(x) not in PLAIN:
        return subclass(x)
    if x.is_cuda or (INTERPRETED and x.is_cpu):
        return None
    return f"the device is {x.device.type}, not a GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"


def as_rows(x: Tensor) -> Tensor:
    """``x`` as (rows, hidden) with contiguous rows, copied only if its leading strides are not those of rows."""
    return with_contiguous_rows(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def with_contiguous_rows(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """The device of ``x`` as the current one; free where it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device of ``x``; a small number in the interpreter, so that loops loop."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that one program may have on the device of ``x``; those of an H100 in the interpreter."""
    if not x.is_cuda:
        return 227 << 10
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # AMD's has no more


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


next_power_of_two = triton.next_power_of_2
