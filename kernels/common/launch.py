"""Ready what every Triton launch needs: operands as rows, a configuration, the device, the reason why it cannot run."""

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

MAX_EXTENT = 2**31 - 2**14  # rows and columns are counted in 32 bits, beyond the end by a block; offsets in 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration: ``vars(config)`` are the arguments of a launch that are neither operands nor sizes."""

    num_warps: int
    # Triton 3.10 changes the default. Contracting a multiplication and an addition only drops a rounding, and no
    # rounding that Hugging Face makes stands between a multiplication and an addition of ours.
    enable_fp_fusion: bool = True


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Config):
    """What one program holds in registers of rows: some of them, by a power of two of their columns."""

    BLOCK_ROWS: int
    BLOCK_COLUMNS: int


@functools.lru_cache
def config_for(hidden: int) -> RowsConfig:
    """Move rows, 16 elements a thread: two 16-byte loads in flight for bfloat16. Narrow rows share a program."""
    columns = min(4096, next_power_of_two(max(hidden, 1)))
    return RowsConfig(BLOCK_ROWS=min(256, 4096 // columns), BLOCK_COLUMNS=columns, num_warps=8)


@functools.lru_cache
def norm_config_for(hidden: int, backward: bool = False) -> RowsConfig:
    """Give each thread 32 elements, for bfloat16 four 16-byte loads in flight; half as many in the backward.

    The backward holds three operands and the weight gradient at once, and has what comes next in flight: `stages_for`.
    Narrow rows share a program: with one head of 128 channels per program, seven eighths of it would idle.
    """
    per_thread = 16 if backward else 32
    columns = next_power_of_two(hidden)
    rows = min(64, max(1, 2048 // columns))  # more would only spread narrow rows over more registers
    warps = min(16, max(4, columns // (32 * per_thread)))
    return RowsConfig(BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, num_warps=warps)


def stages_for(step: int, shared: int) -> int:
    """Say in how many stages a persistent norm loads what it takes at a step, so many bytes: one is the step itself.

    Registers leave few programs a multiprocessor. In two of them copies that pass the registers by, 24 KiB in each, are
    the 48 KiB in flight that an H200 needs. AMD's shared memory is too small.
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
    """View ``x`` as (rows, hidden) with contiguous rows; a copy only if its leading strides are not those of rows."""
    return with_contiguous_rows(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Copy ``x`` only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of ``x`` the current one; free where it already is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def properties_of(device: torch.device) -> Any:
    """Ask for the properties of a GPU, once: each backward would wait for the answer."""
    return torch.cuda.get_device_properties(device)


def processors(x: Tensor) -> int:
    """Count the multiprocessors of the device of ``x``; a small number in the interpreter, so that loops loop."""
    return properties_of(x.device).multi_processor_count if x.is_cuda else 2


def shared_memory(x: Tensor) -> int:
    """Count the bytes of shared memory that a program may have where ``x`` is; an H100's in the interpreter."""
    if not x.is_cuda:
        return 227 << 10
    properties = properties_of(x.device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # AMD's has no more


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


next_power_of_two = triton.next_power_of_2
