"""The CUDA kernels, compiled for the CPU, as backends of the registry: "emulated" and, in check mode, "checked"."""

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
    return _load() or backends.compiled_backend("emulated", "vlmfast_emulated", op, reference)


def open_library(path: Path) -> ctypes.CDLL:
    """Open a library to call the functions that it exports besides its ops."""
    library = ctypes.CDLL(str(path))
    library.vlmfast_emulation_error.restype = ctypes.c_char_p
    library.vlmfast_emulation_allow.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int]
    return library


@functools.cache
def check_library(family: str) -> ctypes.CDLL:
    """Load the kernels of one family in check mode, as torch.ops.vlmfast_checked_<family>."""
    path = build.build("check", library=f"vlmfast_checked_{family}", sources=[build.CSRC / family / "cuda.cu"])
    torch.ops.load_library(str(path))
    return open_library(path)


def check_loader(op: str, family: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Load only the family of an op, because check mode takes long to compile."""
    if reason := build.missing():
        return reason
    check_library(family)
    return backends.compiled_backend("checked", f"vlmfast_checked_{family}", op, reference)
