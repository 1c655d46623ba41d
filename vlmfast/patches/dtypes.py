"""Keep patched models running in dtypes that the ops do not take."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlmfast.checks import DTYPES
from vlmfast.functions import OpFunction


def accepting(function: OpFunction[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """Return the op, or its definition where the op does not take the dtype of ``x`` (float64)."""
    return function if x.dtype in DTYPES else function.op.reference
