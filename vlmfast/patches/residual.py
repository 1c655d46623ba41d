"""Additions to the residual stream in one launch with the norm that reads their sum.

A layer's last sum goes to a norm that is not the layer's own: that of the next layer, or the one after the last. There
the model's own loop stands between the two, and whatever a user put into it. So the layer returns the sum, as
upstream's does, and leaves what the norm will make of it with this tensor. The norm takes that if it is given exactly
this tensor as it was left, and computes in every other case. Nothing is kept anywhere else, so that threads, early
exits and exceptions have nothing to disturb, and what nobody takes is gone with the tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.backends import PLAIN
from vlmfast.modules import calls_early, is_bare
from vlmfast.ops.rms_norm import add_rms_norm
from vlmfast.torch_internals import any_requires_grad, is_compiling, is_grad_enabled

LEFT = "_vlmfast_left"  # of a sum: (the norm, what it makes of the sum, the version of the sum)
FOLLOWING = "following_norm"  # of a layer: the `Following` norm

# What replaces the forward of a norm -> the name of its eps, and the variant; patches/rms_norm.py fills it.
NORMS: dict[Callable[..., Any], tuple[str, str]] = {}


class Following:
    """The norm that reads the sum which a layer returns, as the modules of the model stand now.

    It holds none of them: a layer that is copied alone, or taken out of its model, has nothing that follows.
    """

    __slots__ = ("_holder", "_path")

    def __init__(self, holder: nn.Module, *path: str) -> None:
        self._holder, self._path = weakref.ref(holder), path

    def norm(self) -> nn.Module | None:
        """Find the norm; None where it is not there, or where something runs before it that may change its weight."""
        module: Any = self._holder()
        for name in self._path:
            module = None if module is None else module._modules.get(name)
            if module is None or calls_early(module):
                return None
        found: nn.Module = module
        return found

    def obstacle(self) -> str | None:
        """Say why the sum is not normalised where it is made, or None."""
        norm = self.norm()
        if norm is None:
            return f"{self._path[-1]} that follows: it is not there, or has a hook before it"
        reason = obstacle(norm)
        return None if reason is None else f"{self._path[-1]} that follows: {reason}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Following | None:
        """Follow the copy of the layer, where what holds it is copied as well."""
        holder = memo.get(id(self._holder()))
        return None if holder is None else Following(holder, *self._path)


def obstacle(norm: nn.Module) -> str | None:
    """Say why an addition cannot normalise as this norm does, or None."""
    if type(norm).forward not in NORMS:
        return f"a {type(norm).__name__} is not replaced, or has no norm that an addition has"
    return None if type(norm._parameters.get("weight")) in PLAIN else "its weight is no plain tensor"


def add_then_norm(residual: Tensor, hidden_states: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``norm(residual + hidden_states)`` and the sum."""
    # what a compiler makes of upstream's lines is as good
    found = _fused(residual, hidden_states, norm) if not is_compiling() and is_bare(norm) else None
    if found is not None:
        return found
    hidden_states = residual + hidden_states
    return norm(hidden_states), hidden_states


def add_before_next(layer: nn.Module, residual: Tensor, hidden_states: Tensor) -> Tensor:
    """Return ``residual + hidden_states``, which the layer returns, and leave with it what the next norm makes of it.

    Not where a gradient is needed: that of the sum, which a hook or a user may ask for, would lack what comes through
    the norm. Not in inference mode either, whose tensors do not tell that they were changed in place.
    """
    following = None if is_compiling() else layer.__dict__.get(FOLLOWING)
    if following is not None and not torch.is_inference_mode_enabled():
        norm = following.norm()
        if norm is not None and not _needs_gradient(norm, residual, hidden_states):
            found = _fused(residual, hidden_states, norm)
            if found is not None:
                normed, total = found
                setattr(total, LEFT, (norm, _state(norm, total), normed))
                return total
    return residual + hidden_states


def taken(norm: nn.Module, x: Tensor) -> Tensor | None:
    """Take what was left with a tensor for this norm; None where there is nothing, or it is not as it was left."""
    left = None if is_compiling() else getattr(x, LEFT, None)
    if left is None or left[0] is not norm:
        return None
    delattr(x, LEFT)
    _, state, normed = left
    as_left = state == _state(norm, x) and not _needs_gradient(norm, x)
    return normed if as_left else None


def forget(x: Tensor) -> None:
    """Let go of what was left with a tensor, where what is read next is another one."""
    if not is_compiling() and getattr(x, LEFT, None) is not None:
        delattr(x, LEFT)


def _state(norm: nn.Module, total: Tensor) -> tuple[int, ...]:
    """Tell a sum and the weight that is about to multiply it from what either is after a change."""
    weight: Any = norm._parameters["weight"]
    return total._version, id(weight), -1 if weight.is_inference() else weight._version


def _needs_gradient(norm: nn.Module, *tensors: Tensor) -> bool:
    return is_grad_enabled() and any_requires_grad(norm._parameters.get("weight"), *tensors)


def _fused(residual: Tensor, hidden_states: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return ``norm(residual + hidden_states)`` and the sum; None where that takes upstream's own lines.

    A norm that is not one of ours needs them, and tensors that the op does not take.
    """
    how = NORMS.get(type(norm).forward)
    weight = norm._parameters.get("weight")
    if how is None or type(weight) not in PLAIN:
        return None
    eps, variant = how
    try:
        return add_rms_norm(hidden_states, residual, weight, getattr(norm, eps), variant)
    except (TypeError, ValueError):
        return None
