"""The state of torch that each call of an op reads. Every private name of torch that the ops use is in this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.modules.module
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Function = TypeVar("Function", bound=Callable[..., Any])

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
is_inference_mode_enabled: Callable[[], bool] = torch.is_inference_mode_enabled
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad  # twice as fast as a loop in Python
is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # all tracers but torch.jit's are such modes
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing
in_function_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
forward_mode = forward_ad  # its `_current_level` is -1 outside; a function that reads it would cost 0.03 us
has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
# Its "_global_forward_hooks" and others are the hooks of all modules. A call of torch's function would cost 0.1 us.
HOOKS: dict[str, Any] = vars(torch.nn.modules.module)
inference_mode: Callable[[bool], Any] = torch._C._InferenceMode  # torch.inference_mode costs 3 us more
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
assert_async: Callable[[torch.Tensor, str], None] = torch._assert_async


def constant_result(function: Function) -> Function:
    """Mark a function that torch.compile calls while tracing, without guards on what the function reads.

    Does what `torch.compiler.assume_constant_result` does, without its import of torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exporting() -> bool:
    """Return whether torch.export, torch.jit or make_fx traces a graph that may run without this package."""
    if torch.compiler.is_exporting() or is_jit_tracing():
        return True
    # torch.compile traces its own graphs by the same mode as make_fx.
    return get_proxy_mode() is not None and TracingContext.try_get() is None


def function_of(overload: Any) -> Callable[..., Any]:
    """Return the function behind the overload of a compiled op, which saves 0.2 us per call."""
    function: Callable[..., Any] = overload._op
    return function
