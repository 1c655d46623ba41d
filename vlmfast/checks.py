"""Refusals shared by the ops: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from vlmfast.torch_internals import assert_async, dispatch_modes, in_function_transform

DTYPES = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16))  # a set that keeps its order


def tensor(name: str, value: object, dims: Sequence[str] = (), dtypes: Collection[torch.dtype] = DTYPES) -> None:
    """Raise unless ``value`` is a tensor of one of the dtypes and, if given, with dimensions of those names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")
    if dims and value.dim() != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}), got {tuple(value.shape)}")


def same_tokens(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have the same first two sizes, batch and tokens, on one device."""
    if value.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name} must have the first two sizes of {other_name}, {tuple(other.shape[:2])}, got {tuple(value.shape)}"
        )
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one shape."""
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")


def epsilon(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    if type(value) is float and 0.0 <= value < math.inf:
        return  # the fast path of nearly every call
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def integer(name: str, value: object) -> None:
    """Raise unless ``value`` is an int, or a tracer's stand-in for one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def within(name: str, value: int, most: int, of: str, *sizes: int) -> None:
    """Raise unless ``value`` is an int from 0 to ``most``, the number ``of`` something, a format of ``sizes``."""
    integer(name, value)
    if not 0 <= value <= most:
        raise ValueError(f"{name} must be within 0 and {most}, {of.format(*sizes)}, got {value}")


def bounds(name: str, value: Tensor, parts: str, last: int, of: str, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` says where ``parts`` begin and the last one ends: int32, from 0 to ``last``, ``of`` what.

    The values of a tensor on a GPU are not read.
    """
    tensor(name, value, dtypes=(torch.int32,))
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} must have shape ({parts} + 1,), got {tuple(value.shape)}")
    same_device(name, value, other_name, other)
    if on_host(value):
        found = value.tolist()
        if found[0] != 0 or found[-1] != last or found != sorted(found):
            raise ValueError(f"{name} must rise from 0 to {last}, {of}, got {found}")


def expect(condition: Tensor, message: str) -> None:
    """Raise on a CPU, or fail a device-side assertion on a GPU, without a synchronisation."""
    if not in_function_transform():  # vmap has no rule for it
        assert_async(condition, message)


def on_host(value: Tensor) -> bool:
    """Return whether the values can be read without a synchronisation; not those of a tracer or of vmap."""
    if not value.is_cpu or type(value) is not Tensor or torch.compiler.is_compiling():
        return False
    return not (dispatch_modes() or in_function_transform())
