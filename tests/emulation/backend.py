"""The CUDA kernels, compiled for the CPU, as backends of the registry: "emulated" and those of check mode.

Check mode takes long to compile, so it compiles one family, and for a call in bfloat16 no kernels of other types.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.emulation import build
from vlmfast import backends


@functools.cache
def _load() -> str | None:
    if reason := build.missing():
        return f"the CUDA kernels cannot be compiled for the CPU: {reason}"
    torch.ops.load_library(str(build.build("plain")))
    return None


def loader(op: str, family: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Load the emulated kernels of an op; a loader for `backends.LOADERS`."""
    return _load() or _backend("emulated", "vlmfast_emulated", op, reference)


def _backend(name: str, namespace: str, op: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Make a backend that takes what the kernels for GPUs take, on CPU tensors."""
    mixed = backends.mixed_of(op, reference)
    as_on_gpu = None if mixed is None else lambda device, *args: mixed("cuda", *args)
    return backends.compiled_backend(name, namespace, op, reference, as_on_gpu)


def open_library(path: Path) -> ctypes.CDLL:
    """Open a library to call the functions that it exports besides its ops."""
    library = ctypes.CDLL(str(path))
    library.vlmfast_emulation_error.restype = ctypes.c_char_p
    library.vlmfast_emulation_allow.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int]
    return library


def checked_name(bfloat16_alone: bool) -> str:
    """Name the backend in check mode, which is part of the namespaces of its ops."""
    return "checked_bfloat16" if bfloat16_alone else "checked"


@functools.cache
def check_library(family: str, bfloat16_alone: bool) -> ctypes.CDLL:
    """Load the kernels of one family in check mode, as torch.ops.vlmfast_<name>_<family>."""
    library, sources = f"vlmfast_{checked_name(bfloat16_alone)}_{family}", [build.CSRC / family / "cuda.cu"]
    path = build.build("check", bfloat16_alone=bfloat16_alone, library=library, sources=sources)
    torch.ops.load_library(str(path))
    return open_library(path)


def check_loader(
    op: str, family: str, reference: Callable[..., Any], *, bfloat16_alone: bool
) -> backends.Backend | str:
    if reason := build.missing():
        return reason
    check_library(family, bfloat16_alone)
    name = checked_name(bfloat16_alone)
    return _backend(name, f"vlmfast_{name}_{family}", op, reference)
