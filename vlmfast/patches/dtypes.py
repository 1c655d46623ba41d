"""What a patched model does with a dtype that the ops do not take."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlmfast.checks import DTYPES
from vlmfast.registry import OpFunction


def accepting(function: OpFunction[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """The op, or where it does not take the dtype of ``x``, such as float64, its definition."""
    return function if x.dtype in DTYPES else function.op.reference
