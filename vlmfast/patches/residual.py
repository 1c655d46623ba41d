"""Fuse each addition to the residual stream with the norm that reads the sum.

The last sum of a layer is read by a norm of another module: the first norm of the next layer, or the norm behind the
last layer. Between the two runs the model's own loop, with whatever a user put into it. So the layer returns the sum,
as upstream's does, and attaches the normalised sum to it as an attribute. The norm takes that attribute if its input is
exactly this tensor, unchanged; otherwise it computes. No state lives anywhere else: threads, early exits and exceptions
cannot disturb it, and a result that is never taken is freed with its tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vlmfast.backends import PLAIN
from vlmfast.modules import calls_early, run_of
from vlmfast.ops.rms_norm import add_rms_norm
from vlmfast.torch_internals import (
    any_requires_grad,
    inference_mode,
    is_compiling,
    is_grad_enabled,
    is_inference_mode_enabled,
    set_grad_enabled,
)

LEFT = "_vlmfast_left"  # attribute of a sum: (the norm, `_state` of norm and sum, the normalised sum)
FOLLOWING = "following_norm"  # attribute of a layer: its `Following`

# Replacement of a norm's forward -> (name of the eps attribute, variant of `rms_norm`); patches/rms_norm.py fills it.
NORMS: dict[Callable[..., Any], tuple[str, str]] = {}


class Following:
    """Find the norm that reads the sum a layer returns, by its path in the model.

    It refers to the model only weakly: a layer that is copied alone, or taken out of its model, has no following norm.
    """

    __slots__ = ("_holder", "_path")

    def __init__(self, holder: nn.Module, *path: str) -> None:
        self._holder, self._path = weakref.ref(holder), path

    def norm(self) -> nn.Module | None:
        """Return the norm; None where it is missing, or where a hook that runs before it may change its weight."""
        module: Any = self._holder()
        for name in self._path:
            module = None if module is None else module.__dict__["_modules"].get(name)
            if module is None or calls_early(module):
                return None
        found: nn.Module = module
        return found

    def obstacle(self) -> str | None:
        """Say why the addition is not fused with this norm, or return None."""
        norm = self.norm()
        if norm is None:
            return f"{self._path[-1]} that follows: it is not there, or has a hook before it"
        reason = obstacle(norm)
        return None if reason is None else f"{self._path[-1]} that follows: {reason}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Following | None:
        """Point to the copied model; None where the layer is copied without the module that holds its norm."""
        holder = memo.get(id(self._holder()))
        return None if holder is None else Following(holder, *self._path)


def obstacle(norm: nn.Module) -> str | None:
    """Say why an addition cannot be fused with this norm, or return None."""
    if type(norm).forward not in NORMS:
        return f"a {type(norm).__name__} is not replaced, or has no norm that an addition has"
    return None if type(norm._parameters.get("weight")) in PLAIN else "its weight is no plain tensor"


def normalise(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return ``layer.<name>(x)`` of a norm, which the layer before may have left."""
    run, norm = run_of(layer, name)
    left = taken(norm, x) if run in NORMS else None
    return run(norm, x) if left is None else left  # type: ignore[no-any-return]


def add_then_norm(residual: Tensor, hidden_states: Tensor, layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return ``layer.<name>(residual + hidden_states)`` and the sum."""
    run, norm = run_of(layer, name)
    found = _fused(residual, hidden_states, norm, NORMS[run]) if run in NORMS else None
    if found is not None:
        return found
    hidden_states = residual + hidden_states
    return run(norm, hidden_states), hidden_states


def add_before_next(layer: nn.Module, residual: Tensor, hidden_states: Tensor) -> Tensor:
    """Return ``residual + hidden_states``, with the next norm's result attached where that is possible.

    Nothing is attached where a gradient is needed: the gradient of the sum, which a hook or a user may ask for, would
    lack the part that comes through the norm.
    """
    following = layer.__dict__.get(FOLLOWING)
    norm = None if following is None else following.norm()
    if norm is not None and not _needs_gradient(norm, residual, hidden_states):
        how = NORMS.get(type(norm).forward)
        if is_inference_mode_enabled():
            with inference_mode(False):  # tensors of inference mode do not record that they were changed in place
                set_grad_enabled(False)  # for this block
                found = _fused(residual, hidden_states, norm, how)
        else:
            found = _fused(residual, hidden_states, norm, how)
        if found is not None:
            normed, total = found
            setattr(total, LEFT, (norm, _state(norm, total), normed))
            return total
    return residual + hidden_states


def taken(norm: nn.Module, x: Tensor) -> Tensor | None:
    """Detach and return the result of this norm from its input; None where there is none, or the input has changed."""
    left = getattr(x, LEFT, None)
    if left is None or left[0] is not norm:
        return None
    delattr(x, LEFT)
    _, state, normed = left
    as_left = state == _state(norm, x) and not _needs_gradient(norm, x)
    return normed if as_left else None


def forget(x: Tensor) -> None:
    """Drop a result that is attached to a tensor, because its norm will read another tensor."""
    if not is_compiling() and getattr(x, LEFT, None) is not None:
        delattr(x, LEFT)


def _state(norm: nn.Module, total: Tensor) -> tuple[int, ...]:
    """Return a value that changes with the sum and with the weight of the norm."""
    weight: Any = norm.__dict__["_parameters"]["weight"]
    return total._version, id(weight), -1 if weight.is_inference() else weight._version


def _needs_gradient(norm: nn.Module, *tensors: Tensor) -> bool:
    return is_grad_enabled() and any_requires_grad(norm._parameters.get("weight"), *tensors)


def _fused(
    residual: Tensor, hidden_states: Tensor, norm: nn.Module, how: tuple[str, str] | None
) -> tuple[Tensor, Tensor] | None:
    """Return ``norm(residual + hidden_states)`` and the sum, for what `NORMS` says of the norm.

    None where upstream's own lines have to run: for a norm that is not replaced, and tensors that the op does not take.
    """
    weight = norm.__dict__["_parameters"].get("weight")
    if how is None or type(weight) not in PLAIN:
        return None
    eps, variant = how
    try:
        return add_rms_norm(hidden_states, residual, weight, getattr(norm, eps), variant)
    except (TypeError, ValueError):
        return None
