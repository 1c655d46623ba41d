"""The loaders of the backends. A loader returns the backend of one op, or a sentence that says why there is none."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.architectures import CUDA
from vlmfast.torch_internals import function_of, has_kernel


@dataclass(frozen=True)
class Backend:
    """One implementation of one op, called with positional arguments."""

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]  # why this call cannot run here, or None
    absent_on: Callable[[Tensor], str | None] = lambda x: None  # why it has no kernel on this tensor's device, or None
    absent: str | None = None  # why there is no such backend at all
    takes_cpu: bool = False  # it takes every call whose tensors are plain, of one dtype and on the CPU


# Other subclasses of Tensor (DTensor, nested tensors, ...) may own no memory that a kernel could read.
PLAIN = (Tensor, torch.nn.Parameter)
SCALARS = frozenset((float, int, bool, str, type(None)))  # isinstance would cost 0.06 us in Tensor's metaclass
OLDEST_GPU = divmod(min(CUDA), 10)


def absent(name: str, reason: str) -> Backend:
    """Make the stand-in for an absent backend, which refuses every call."""
    return Backend(name, lambda *_: None, lambda *_: reason, lambda x: reason, reason)


def loader(name: str) -> Callable[[str, str, Callable[..., Any]], Backend | str]:
    """Return the loader of a backend; raise ValueError for an unknown name, which only VLMFAST_BACKEND can hold."""
    if name not in LOADERS:
        raise ValueError(f"VLMFAST_BACKEND must be one of {', '.join(LOADERS)}, got {name!r}")
    return LOADERS[name]


def load(name: str, op: str, family: str, reference: Callable[..., Any]) -> Backend:
    """Load the backend of that name for one op."""
    found = loader(name)(op, family, reference)
    return absent(name, found) if isinstance(found, str) else found


def subclass(value: Tensor) -> str:
    """Say why a kernel cannot take a tensor whose type is not one of `PLAIN`."""
    return f"{type(value).__name__} is a subclass of Tensor"


@functools.cache
def _gpus_are_new_enough() -> bool:
    """Return whether all GPUs are supported. Call it for GPU tensors only: it initialises CUDA, which forbids forks."""
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_capability(index) for index in devices) >= OLDEST_GPU


def contiguous(output: Any) -> Any:
    """Make the outputs contiguous, as every op promises."""
    if isinstance(output, tuple):
        return tuple(contiguous(o) for o in output)
    return output.contiguous()


def _libraries() -> list[Path]:
    return sorted(Path(__file__).parent.glob("_C*.so"))


@functools.cache
def load_extension() -> str | None:
    """Load the compiled extension, and return the reason why it is not usable, or None."""
    found = _libraries()
    if not found:
        return "the extension is not built (pip install --no-build-isolation . with a C++ compiler builds it)"
    try:
        torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the extension {found[0].name} does not load: {error}"
    return None


def cpu_level() -> str | None:
    """Return the instruction set of the compiled CPU kernels: "v3", or "v3 of v4" where the processor has more."""
    if load_extension() is not None:
        return None
    library = ctypes.CDLL(str(_libraries()[0]))
    if not hasattr(library, "vlmfast_cpu_level"):  # compiled before there was this function
        return None
    names = []
    for function in (library.vlmfast_cpu_level, library.vlmfast_supported_cpu_level):
        function.restype = ctypes.c_char_p
        names.append(function().decode())
    used, supported = names
    return used if used == supported else f"{used} of {supported}"


def compiled_backend(
    name: str, namespace: str, op: str, fake: Callable[..., Any], mixed: Callable[..., bool] | None = None
) -> Backend | str:
    """Make a backend of the compiled op in one torch library namespace.

    ``mixed`` gets a device's type and the arguments, and tells whether the kernels for it take a call with tensors of
    several dtypes; by default they take none.
    """
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None:
        return f"csrc/ has no {op}"
    overload = packet.default
    torch.library.register_fake(f"{namespace}::{op}", lambda *args, **kwargs: contiguous(fake(*args, **kwargs)))
    on_cpu, on_gpu = (has_kernel(f"{namespace}::{op}", key) for key in ("CPU", "CUDA"))

    def unsupported(*args: Any) -> str | None:
        dtype = None
        for value in args:
            kind = type(value)
            if kind not in PLAIN:
                if kind not in SCALARS and isinstance(value, Tensor):
                    return subclass(value)
                continue
            found = value.dtype  # read once: each attribute of a tensor costs at least 0.05 us
            if found is dtype:
                continue
            if found.is_floating_point:
                if dtype is not None and not (mixed is not None and mixed(value.device.type, *args)):
                    return f"the tensors are of several dtypes ({dtype} and {found})"
                dtype = found
            # value.device.type would cost 0.4 us
            if not ((value.is_cpu and on_cpu) or (value.is_cuda and on_gpu and _gpus_are_new_enough())):
                return f"the extension has no {op} for device {value.device.type}"
        return None

    return Backend(name, function_of(overload), unsupported, unsupported, takes_cpu=on_cpu)


def mixed_of(op: str, reference: Callable[..., Any]) -> Callable[..., bool] | None:
    """Return the function beside an op's definition that `compiled_backend` takes as ``mixed``, if there is one."""
    return getattr(importlib.import_module(reference.__module__), f"{op}_mixed", None)


def _native(op: str, family: str, reference: Callable[..., Any]) -> Backend | str:
    return load_extension() or compiled_backend("native", "vlmfast_native", op, reference, mixed_of(op, reference))


def _triton(op: str, family: str, reference: Callable[..., Any]) -> Backend | str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    name = reference.__module__.rpartition(".")[0].replace(".ops.", ".kernels.")
    if importlib.util.find_spec(name) is None:
        return f"there is no kernels/{family}"
    module = importlib.import_module(name)
    if not hasattr(module, op):
        return f"kernels/{family} has no {op}"
    launch = importlib.import_module("vlmfast.kernels.common.launch")
    unsupported = getattr(module, f"{op}_unsupported", None) or module.unsupported  # of one op, or of its family
    return Backend("triton", getattr(module, op), unsupported, launch.device_unsupported)


def _torch(op: str, family: str, reference: Callable[..., Any]) -> Backend | str:
    return Backend("torch", lambda *args: contiguous(reference(*args)), lambda *_: None)


LOADERS: dict[str, Callable[[str, str, Callable[..., Any]], Backend | str]] = {
    "native": _native,
    "triton": _triton,
    "torch": _torch,
}
