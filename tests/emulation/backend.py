"""The CUDA kernels, compiled for the CPU, as a backend of the registry: `vlmfast.use("emulated")`."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def loader(op: str, stem: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """As the loaders of `backends.LOADERS`."""
    return _load() or backends.compiled_backend("emulated", "vlmfast_emulated", op, reference)
