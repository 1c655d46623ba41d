"""Shared by all Triton launches: operands as rows, launch configurations, the device, and reasons to decline a call."""

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vlmfast.backends import PLAIN, subclass

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton compiles an assertion only in debug mode, which would also check every 32-bit operation for overflow.
ASSERTING = {"debug": True, "sanitize_overflow": False}

MAX_EXTENT = 2**31 - 2**14  # row and column numbers, up to a block past the end, have 32 bits; offsets have 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration: ``vars(config)`` are the keyword arguments of a launch."""

    num_warps: int
    # Fixed because Triton 3.10 changes the default. An FMA drops the rounding between a multiplication and an addition,
    # also one to the dtype, because LLVM multiplies in bfloat16 what is rounded to it: kernels that add such products
    # turn it off.
    enable_fp_fusion: bool = True


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Config):
    """The tile of rows that one program holds in registers: BLOCK_ROWS x BLOCK_COLUMNS, both powers of two."""

    BLOCK_ROWS: int
    BLOCK_COLUMNS: int


@functools.lru_cache
def config_for(hidden: int) -> RowsConfig:
    """Choose a tile for moving rows: 16 elements per thread, which are two 16-byte loads in flight for bfloat16.

    Narrow rows share a program.
    """
    columns = min(4096, next_power_of_two(max(hidden, 1)))
    return RowsConfig(BLOCK_ROWS=min(256, 4096 // columns), BLOCK_COLUMNS=columns, num_warps=8)


@functools.lru_cache
def norm_config_for(hidden: int, backward: bool = False) -> RowsConfig:
    """Choose a tile for a norm: 32 elements per thread, which are four 16-byte loads in flight for bfloat16.

    The backward has 16 elements per thread, because it holds three operands and the weight gradient at once; it
    prefetches the next rows instead, see `stages_for`. Narrow rows share a program: with one head of 128 channels per
    program, seven eighths of the threads would idle.
    """
    per_thread = 16 if backward else 32
    columns = next_power_of_two(hidden)
    rows = min(64, max(1, 2048 // columns))  # more rows would only take more registers
    warps = min(16, max(4, columns // (32 * per_thread)))
    return RowsConfig(BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, num_warps=warps)


def stages_for(step: int, shared: int) -> int:
    """Choose the pipeline stages of a persistent norm that loads ``step`` bytes per step; 1 means no prefetch.

    Register use limits occupancy to two programs per multiprocessor. Each prefetches 24 KiB by asynchronous copies to
    shared memory, which together are the 48 KiB in flight that an H200 needs. AMD's shared memory is too small.
    """
    ahead = ceil_div(24 << 10, step)
    return 1 + ahead if 64 << 10 < shared >= 2 * ahead * step else 1


def device_unsupported(x: Tensor) -> str | None:
    """Say why Triton cannot run on the device of ``x``, or None."""
    if type(x) not in PLAIN:
        return subclass(x)
    if x.is_cuda or (INTERPRETED and x.is_cpu):
        return None
    return f"the device is {x.device.type}, not a GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"


def as_rows(x: Tensor) -> Tensor:
    """View ``x`` as (rows, hidden) with contiguous rows; copies it if its strides do not allow that."""
    return with_contiguous_rows(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Copy ``x`` only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of ``x`` the current one; costs nothing if it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def properties_of(device: torch.device) -> Any:
    """Return the properties of a GPU, cached because a query would delay each backward."""
    return torch.cuda.get_device_properties(device)


def processors(x: Tensor) -> int:
    """Count the multiprocessors of the device of ``x``; two in the interpreter, so that persistent kernels loop."""
    return properties_of(x.device).multi_processor_count if x.is_cuda else 2


def shared_memory(x: Tensor) -> int:
    """Return the bytes of shared memory available to a program on the device of ``x``; an H100's in the interpreter."""
    if not x.is_cuda:
        return 227 << 10
    properties = properties_of(x.device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # AMD's has no more


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


next_power_of_two = triton.next_power_of_2
