"""Find out what Triton's JIT would compile for a launch on a GPU that this machine does not have.

The JIT's own code decides: which arguments are constants, which pointers are multiples of 16 bytes and, on AMD, which
tensors are smaller than 2 GB. The helpers work under Triton's interpreter too, where kernels are no ``JITFunction``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from tests.ptx.compile import OPTIONS
from vlmfast.architectures import CUDA, GPUS

TARGETS = {name: GPUTarget("hip", name, 64) for name in GPUS if name.startswith("gfx")}
TARGETS |= {f"sm_{n}": GPUTarget("cuda", n, 32) for n in CUDA}


class Unaligned(MockTensor):
    """A tensor whose address is no multiple of 16 bytes, for `source_of`."""

    @staticmethod
    def data_ptr() -> int:
        return 8


@functools.cache
def _binder(kernel: Any, target: str) -> tuple[JITFunction, Any, Callable[..., Any]]:
    """Return a kernel as a ``JITFunction``, Triton's backend for the target, and the binder that specialises a call."""
    interpreted = not isinstance(kernel, JITFunction)
    function = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"]) if interpreted else kernel
    backend = make_backend(TARGETS[target])
    return function, backend, create_function_from_signature(function.signature, function.params, backend)


def key_of(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], target: str = "sm_90") -> str:
    """Return the JIT's own cache key, which differs between the specialisations of one kernel."""
    _, _, binder = _binder(kernel, target)
    _, specialisation, _ = binder(**arguments)
    return f"{specialisation} {sorted(options.items())}"


def source_of(kernel: Any, arguments: dict[str, Any], target: str) -> ASTSource:
    """Return the specialisation that the JIT would make of these arguments for a GPU.

    Tensors on the meta device count as aligned to 16 bytes, as torch's allocations are, and views that start at a row
    of a multiple of 16 bytes.
    """
    function, backend, binder = _binder(kernel, target)
    bound, specialisation, options = binder(**arguments)
    _, signature, constants, attributes = function._pack_args(backend, {}, bound, specialisation, options)
    return ASTSource(function, signature, constants, {place: found for place, found in attributes.items() if found})


@contextmanager
def launched(execute: bool = True) -> Iterator[list[tuple[Any, str]]]:
    """Record (kernel, `key_of`) of each launch in the block; with ``execute=False`` the launches do not run."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[tuple[Any, str]] = []

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            arguments = dict(inspect.signature(kernel.fn).bind(*args, **kwargs).arguments)
            found.append((kernel, key_of(kernel, arguments, options)))
            return original(kernel, *args, grid=grid, warmup=warmup, **kwargs, **options) if execute else None

        return run

    with ExitStack() as stack:
        for cls in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(cls, "run", watched(cls.run)))
        yield found
