"""The state of torch that each call of an op asks for, some of it under private names: all of those are here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad  # in half the time of a loop in Python
is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling  # other tracers are dispatch modes
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
in_function_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
forward_mode_level: Callable[[], int] = functools.partial(getattr, forward_ad, "_current_level")  # -1 outside
has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
assert_async: Callable[[torch.Tensor, str], None] = torch._assert_async


def function_of(overload: Any) -> Callable[..., Any]:
    """Return what the overload of a compiled op would call, which saves 0.2 us."""
    function: Callable[..., Any] = overload._op
    return function
