"""The backends `PLACES` of the generated tests: Triton kernels as compiled for a GPU, executed by the machine."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import inspect
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.ptx.compile import OPTIONS, Compiled, compiled
from tests.ptx.machine import Machine, assembled
from tests.ptx.memory import READ, WRITE, GlobalMemory
from tests.ptx.parse import Kernel, PtxError
from vlmfast import backends
from vlmfast.registry import Op

PLACES = {"ptx_sm_90": "sm_90", "ptx_sm_80": "sm_80", "ptx_sm_100": "sm_100"}  # backend -> target
# Ops whose kernels multiply tiles of samples in the tensor memory of sm_100, which is not modelled.
TENSOR_MEMORY = ("received_attention", "farthest", "dpp_map", "merge_slots")
MULTIPROCESSORS = 132  # of an H100 or an H200, for real shapes


def allow(memory: GlobalMemory, tensor: Tensor) -> None:
    """Allow a kernel to access the elements of a tensor, and no byte between them."""
    if tensor.numel() == 0:
        return
    size = tensor.element_size()
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flags = torch.zeros(reach, size, dtype=torch.uint8)
    flags.as_strided((*tensor.shape, size), (*(size * stride for stride in tensor.stride()), 1)).fill_(READ | WRITE)
    memory.allow(tensor.data_ptr(), flags.reshape(-1).numpy())


def pack(kernel: Kernel, values: list[Any]) -> bytes:
    """Lay out the parameters of a launch as the kernel reads them; unused scratch memory is a null pointer."""
    values = [*values, *[0] * (len(kernel.params) - len(values))]
    packed = bytearray(kernel.param_size)
    for (offset, size), value in zip(kernel.params.values(), values, strict=True):
        if isinstance(value, float):
            raw = struct.pack({4: "<f", 8: "<d"}[size], value)
        else:
            number = value.data_ptr() if isinstance(value, Tensor) else int(value)
            if number < 0:  # `KnownBits` relies on this
                raise PtxError(f"{kernel.name}: an argument of a launch is negative, {number}")
            raw = number.to_bytes(size, "little")
        packed[offset : offset + size] = raw
    return bytes(packed)


# Each kernel that has run, assembled once: (PTX, name) -> machine.
machines: dict[tuple[str, str], Machine] = {}


def machine_for(ptx: str, name: str) -> Machine:
    """Return the machine of a module's kernel, assembling it on first use."""
    if (ptx, name) not in machines:
        machines[ptx, name] = assembled(ptx, name)
    return machines[ptx, name]


def forget() -> None:
    """Free all machines, of which the garbage collector knows nothing so far."""
    machines.clear()
    gc.unfreeze()
    gc.collect()


def launch(found: Compiled, name: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Run one launch of a compiled kernel on CPU tensors."""
    memory, machine = GlobalMemory(), machine_for(found.ptx, name)
    for value in arguments.values():
        if isinstance(value, Tensor):
            allow(memory, value)
    params = pack(machine.kernel, [arguments[name] for name in found.passed])
    divisible = {
        param for param, name in zip(machine.kernel.params, found.passed, strict=False) if name in found.divisible
    }
    machine.kernel.divisible.intersection_update(divisible)
    machine.launch(memory, grid, machine.kernel.threads, params, found.shared)


def _run(target: str, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Compile and run a launch, in place of the interpreter."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    arguments = dict(inspect.signature(function.fn).bind(*args, **kwargs).arguments)
    found = compiled(function, arguments, options, target)
    grid = grid(arguments) if callable(grid) else grid
    launch(found, function.fn.__name__, arguments, (*grid, 1, 1)[:3])


@contextlib.contextmanager
def multiprocessors(op: Op, count: int) -> Iterator[None]:
    """Make an op's launchers see a GPU with ``count`` multiprocessors."""
    module = sys.modules[op.backend("triton").run.__module__]
    with (
        mock.patch.object(module, "processors", return_value=count)
        if hasattr(module, "processors")
        else contextlib.nullcontext()
    ):
        yield


def loader(target: str, op: str, family: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Load an op, as the loaders of `backends.LOADERS` do."""
    if torch.cuda.is_available():
        return "with a GPU, Triton's launches are not looked into"
    if target == "sm_100" and op in TENSOR_MEMORY:
        return "its kernels multiply in the tensor memory of sm_100, which the machine does not model"
    return executed(target, op, family, reference)


def executed(target: str, op: str, family: str, reference: Callable[..., Any]) -> backends.Backend | str:
    """Load an op as `loader` does, also one in `TENSOR_MEMORY`."""
    found = backends.LOADERS["triton"](op, family, reference)
    return found if isinstance(found, str) else executing(found, target)


def executing(found: backends.Backend, target: str) -> backends.Backend:
    """Make a backend that executes the kernels which a Triton backend launches."""
    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction

    @functools.wraps(found.run)
    def run(*args: Any) -> Any:
        with mock.patch.object(interpreted, "run", functools.partialmethod(_launcher, target)):
            return found.run(*args)

    return backends.Backend(f"ptx_{target}", run, found.unsupported, found.absent_on)


def _launcher(function: Any, target: str, *args: Any, **kwargs: Any) -> None:
    _run(target, function, *args, **kwargs)


LOADERS = {name: functools.partial(loader, target) for name, target in PLACES.items()}
