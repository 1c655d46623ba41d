"""How each backend is found. A loader returns the backend of one op, or a sentence that says why there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One implementation of one op."""

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]  # why this call cannot run here, or None
    absent_on: Callable[[Tensor], str | None] = lambda x: None  # why it has no kernel where this tensor lies, or None


# Subclasses of Tensor (DTensor, nested tensors, ...) have no memory of their own that a kernel could read.
PLAIN = (Tensor, torch.nn.Parameter)
OLDEST_GPU = (8, 0)  # what setup.py compiles csrc/*.cu for


def subclass(value: Tensor) -> str:
    """Why a kernel cannot take a tensor whose type is not one of `PLAIN`."""
    return f"{type(value).__name__} is a subclass of Tensor"


@functools.cache
def _gpus_are_new_enough() -> bool:
    """Asked with a GPU tensor at hand: the answer initialises CUDA, after which a process must not fork."""
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_capability(index) for index in devices) >= OLDEST_GPU


def contiguous(output: Any) -> Any:
    """Every op returns fresh contiguous tensors, whatever the layout of its inputs."""
    if isinstance(output, tuple):
        return tuple(contiguous(o) for o in output)
    return output.contiguous()


def load_extension() -> str | None:
    """Load the compiled extension; the reason why it is not usable, or None."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "the extension is not built (pip install --no-build-isolation . with a C++ compiler builds it)"
    try:
        torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the extension {found[0].name} does not load: {error}"
    return None


def compiled_backend(name: str, namespace: str, op: str, fake: Callable[..., Any]) -> Backend | str:
    """A backend made of the compiled ops of one torch library namespace."""
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None:
        return f"csrc/ has no {op}"
    overload = packet.default
    torch.library.register_fake(f"{namespace}::{op}", lambda *args, **kwargs: contiguous(fake(*args, **kwargs)))
    on_cpu, on_gpu = (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key) for key in ("CPU", "CUDA")
    )

    def unsupported(*args: Any, **kwargs: Any) -> str | None:
        dtype = None
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) not in PLAIN:
                if isinstance(value, Tensor):
                    return subclass(value)
                continue
            found = value.dtype  # read once: each attribute of a tensor costs 0.05 us and more
            if found is dtype:
                continue
            if found.is_floating_point:
                if dtype is not None:
                    return f"the tensors are of several dtypes ({dtype} and {found})"
                dtype = found
            # not value.device.type, which costs 0.4 us
            if not ((value.is_cpu and on_cpu) or (value.is_cuda and on_gpu and _gpus_are_new_enough())):
                return f"the extension has no {op} for device {value.device.type}"
        return None

    return Backend(name, overload._op, unsupported, unsupported)  # what the overload would call: 0.2 us less


def _native(op: str, stem: str, reference: Callable[..., Any]) -> Backend | str:
    return load_extension() or compiled_backend("native", "vlmfast_native", op, reference)


def _triton(op: str, stem: str, reference: Callable[..., Any]) -> Backend | str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if importlib.util.find_spec(f"vlmfast.kernels.{stem}") is None:
        return f"there is no kernels/{stem}.py"
    module = importlib.import_module(f"vlmfast.kernels.{stem}")
    if not hasattr(module, op):
        return f"kernels/{stem}.py has no {op}"
    launch = importlib.import_module("vlmfast.kernels.launch")
    return Backend("triton", getattr(module, op), getattr(module, f"{op}_unsupported"), launch.device_unsupported)


def _torch(op: str, stem: str, reference: Callable[..., Any]) -> Backend | str:
    return Backend(
        "torch", lambda *args, **kwargs: contiguous(reference(*args, **kwargs)), lambda *args, **kwargs: None
    )


LOADERS: dict[str, Callable[[str, str, Callable[..., Any]], Backend | str]] = {
    "native": _native,
    "triton": _triton,
    "torch": _torch,
}
