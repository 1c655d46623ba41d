"""The state of torch that each call of an op asks for, some of it under private names: all of those are here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Function = TypeVar("Function", bound=Callable[..., Any])

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad  # in half the time of a loop in Python
is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # what other tracers are, but for torch.jit's
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
in_function_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
forward_mode = forward_ad  # its `_current_level` is -1 outside; a function that reads it would cost 0.03 us
has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
assert_async: Callable[[torch.Tensor, str], None] = torch._assert_async


def constant_result(function: Function) -> Function:
    """Have torch.compile call a function while it traces, and guard nothing that this reads.

    As `torch.compiler.assume_constant_result`, which imports torch._dynamo: that takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exporting() -> bool:
    """Tell whether a graph is traced that may run where this package is not: by torch.export, torch.jit or make_fx."""
    if torch.compiler.is_exporting() or is_jit_tracing():
        return True
    # what torch.compile does with a graph of its own is traced by the same mode as make_fx
    return get_proxy_mode() is not None and TracingContext.try_get() is None


def function_of(overload: Any) -> Callable[..., Any]:
    """Return what the overload of a compiled op would call, which saves 0.2 us."""
    function: Callable[..., Any] = overload._op
    return function
