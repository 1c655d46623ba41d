"""Rotary embedding of queries and keys, and the norms of their heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN
from vlmfast.checks import DTYPES
from vlmfast.functions import op
from vlmfast.ops.rms_norm.definition import VARIANTS, rms_norm, rms_norm_backward

_INFINITY = math.inf
MAX_HEAD_DIM = 512  # a head stays in the registers of a few threads


# ---- what a call must look like ----


def _check(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Sequence[int] | None = None,
) -> bool:
    # The fast path of nearly every call, without the function calls below.
    if (
        sections is None
        and type(query) in PLAIN
        and type(key) in PLAIN
        and type(cos) in PLAIN
        and type(sin) in PLAIN
        and (
            (key.is_cpu and cos.is_cpu and sin.is_cpu)
            if (on_cpu := query.is_cpu)
            else query.is_cuda and (device := query.device) == key.device == cos.device == sin.device
        )
        and (dtype := query.dtype) in DTYPES
        and key.dtype == dtype == cos.dtype == sin.dtype
        and len(shape := query.shape) == 4
        and len(key_shape := key.shape) == 4
        and (size := shape[3]) == key_shape[3] <= MAX_HEAD_DIM
        and size % 2 == 0
        and shape[:2] == key_shape[:2]
        and (angles := cos.shape) == sin.shape
        and len(angles) == 3
        and angles[1] == shape[1]
        and (angles[0] == 1 or angles[0] == shape[0])
        and 0 < angles[2] <= size
        and angles[2] % 2 == 0
        and (
            (query_weight is None and key_weight is None)
            or (
                type(query_weight) in PLAIN
                and type(key_weight) in PLAIN
                and query_weight.dtype == dtype == key_weight.dtype  # type: ignore[union-attr]
                and query_weight.shape == (size,) == key_weight.shape  # type: ignore[union-attr]
                and (
                    (query_weight.is_cpu and key_weight.is_cpu)  # type: ignore[union-attr]
                    if on_cpu
                    else query_weight.device == device == key_weight.device  # type: ignore[union-attr]
                )
            )
        )
        and type(eps) is float
        and 0.0 <= eps < _INFINITY
        and variant in VARIANTS
    ):
        return on_cpu
    _check_heads("query", query)
    _check_same_rows("key", key, "query", query)
    _check_weights(query, query_weight, key_weight)
    _check_angles(query, cos, sin, sections)
    checks.epsilon("eps", eps)
    checks.one_of("variant", variant, VARIANTS)
    return False


def _check_heads(name: str, value: Tensor) -> None:
    checks.tensor(name, value)
    if value.dim() < 3:
        raise ValueError(f"{name} must have shape (..., tokens, heads, head_dim), got {tuple(value.shape)}")
    size = value.shape[-1]
    if size % 2 or size > MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head_dim that is even and at most {MAX_HEAD_DIM}, got {size}")


def _check_same_rows(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both have the same tokens, head_dim and dtype; their numbers of heads may differ."""
    checks.tensor(name, value)
    expected = (*other.shape[:-2], "heads", other.shape[-1])
    if value.dim() != other.dim() or value.shape[:-2] != other.shape[:-2] or value.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} must have shape ({', '.join(map(str, expected))}), as {other_name} has, got {tuple(value.shape)}"
        )
    _check_alike(name, value, other_name, other)


def _check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    checks.same_device(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def _check_weights(query: Tensor, query_weight: Tensor | None, key_weight: Tensor | None) -> None:
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is None:
            continue
        checks.tensor(name, weight)
        if weight.dim() != 1 or weight.shape[0] != query.shape[-1]:
            raise ValueError(
                f"{name} must have shape ({query.shape[-1]},), the last size of query, got {tuple(weight.shape)}"
            )
        _check_alike(name, weight, "query", query)
    if (query_weight is None) != (key_weight is None):
        raise ValueError(
            "query_weight and key_weight must both be tensors or both be None, got None for "
            f"{'query_weight' if query_weight is None else 'key_weight'}"
        )


def _check_angles(query: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None) -> None:
    rows = tuple(query.shape[:-2])
    lead = rows if sections is None else (3, *rows)
    for name, value in (("cos", cos), ("sin", sin)):
        checks.tensor(name, value)
        found, batch = tuple(value.shape[:-1]), len(lead) - len(rows)
        shared = (*lead[:batch], 1, *lead[batch + 1 :])
        if found not in (lead, shared):
            expected = ", ".join(map(str, lead))
            raise ValueError(
                f"{name} must have shape ({expected}, rotary_dim), or 1 in place of {rows[0]}, the first size of "
                f"query, got {tuple(value.shape)}"
            )
        size = value.shape[-1]
        if size % 2 or not 0 < size <= query.shape[-1]:
            raise ValueError(
                f"{name} must have an even last size of 2 to {query.shape[-1]}, the head_dim of query, got {size}"
            )
        checks.same_device(name, value, "query", query)
        if value.dtype not in (query.dtype, torch.float32):
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, or float32, got {value.dtype}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise (ValueError if sin.shape != cos.shape else TypeError)(
            f"sin must have the shape and dtype of cos, {tuple(cos.shape)} and {cos.dtype}, got {tuple(sin.shape)} and "
            f"{sin.dtype}"
        )
    _check_sections(cos, sections)


def _check_sections(cos: Tensor, sections: Sequence[int] | None) -> None:
    if sections is None:
        return
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise TypeError(f"sections must be three sizes or None, got {type(sections).__name__}")
    for size in sections:
        checks.integer("sections", size)
    half = cos.shape[-1] // 2
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != half:
        raise ValueError(
            f"sections must be three sizes that sum to {half}, half the last size of cos, got {list(sections)}"
        )


def _check_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Sequence[int] | None = None,
    weight_grad: bool = True,
) -> None:
    _check_heads("grad_query", grad_query)
    _check_same_rows("grad_key", grad_key, "grad_query", grad_query)
    for name, value, grad in (("query", query, grad_query), ("key", key, grad_key)):
        if value is None:
            if query_weight is not None:
                raise ValueError(f"{name} must be a tensor where there are weights, got None")
            continue
        checks.tensor(name, value)
        checks.same_shape(name, value, f"grad_{name}", grad)
        _check_alike(name, value, f"grad_{name}", grad)
    _check_weights(grad_query, query_weight, key_weight)
    _check_angles(grad_query, cos, sin, sections)
    checks.epsilon("eps", eps)
    checks.one_of("variant", variant, VARIANTS)


# ---- calls with several dtypes: the native CPU kernels take float32 angles with 16-bit heads ----


def qk_norm_rope_mixed(device: str, *_: Any) -> bool:
    """Return whether the kernels for a type of device take a call with several dtypes; only those of angles differ."""
    return device == "cpu"


qk_norm_rope_backward_mixed = qk_norm_rope_mixed


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, query_weight, key_weight, cos, sin, ctx.eps, ctx.variant, ctx.sections = inputs
    if not any(ctx.needs_input_grad[:4]):  # angles have no gradient
        ctx.mark_non_differentiable(*output)
    ctx.like = [(value.shape, value.dtype, value.device) for value in (query, key)]
    if query_weight is None:  # without norms the gradients do not depend on the heads
        query = key = None
    ctx.save_for_backward(query, key, query_weight, key_weight, cos, sin)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    query, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
    grad_query, grad_key = (
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=True)
    )
    weight_grad = query_weight is not None and any(ctx.needs_input_grad[2:4])
    grad_query, grad_key, *weights = qk_norm_rope_backward(
        *(grad_query, grad_key, query, key, query_weight, key_weight, cos, sin),
        *(ctx.eps, ctx.variant, ctx.sections, weight_grad),
    )
    return grad_query, grad_key, *(weights if weight_grad else (None, None))


# ---- the definitions ----


@op(check=_check, gradients=(_setup_context, _backward))
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of queries and keys, if there are weights, and rotate it by the angles of its token.

    The norm is `rms_norm` of a head, with the rounding order of ``variant``. The first ``rotary_dim`` elements of its
    result ``y`` are rotated, and the others are left as they are::

        a, b = the first and the second half of y[..., :rotary_dim]
        y[..., :rotary_dim] = y[..., :rotary_dim] * cos + concatenate(-b, a) * sin

    Each product and the sum are rounded to the dtype of ``cos``, and the result to that of ``query``. With float32
    angles and 16-bit heads, as in vision towers, only the result is rounded. Angles carry no gradient. Normalised heads
    are saved for the backward and must not be changed in place before it.

    Args:
        query: (..., tokens, heads, head_dim) float32, float16 or bfloat16, as a projection gives it; any strides, so
            that it may be a slice of queries, keys and values in one tensor. head_dim is even and at most 512.
        key: of the shape of ``query`` except for the number of heads.
        query_weight: (head_dim,) of the dtype of ``query``, or None for no norms.
        key_weight: likewise; None if ``query_weight`` is.
        cos: (..., tokens, rotary_dim) with the leading sizes of ``query``, or 1 as the first for one table for the
            whole batch; of the dtype of ``query`` or float32. With ``sections`` (3, ..., tokens, rotary_dim).
        sin: of the shape and dtype of ``cos``.
        eps: added to the mean square; finite, not negative.
        variant: "llama", "gemma" or "olmo".
        sections: three sizes: how many of the ``rotary_dim / 2`` frequencies use the angles of time, height and width,
            which are the first dimension of ``cos``. None if ``cos`` and ``sin`` combine these already.

    Returns:
        ``(query, key)``, contiguous, of the shapes and the dtype of the arguments. Attention takes their
        ``.transpose(-3, -2)``, which has the strides of upstream's.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, sections, eps or a variant that do
            not fit.

    Source:
        Qwen3Attention.forward of transformers 5.23 with apply_rotary_pos_emb; apply_rotary_pos_emb of Qwen3.5, which
        rotates a part of a head; apply_rotary_pos_emb_vision of Qwen2-VL, in float32; apply_multimodal_rotary_pos_emb
        of Qwen2-VL of 4.57, with sections.
    """
    cos, sin = _combined(cos, sections), _combined(sin, sections)
    return (
        _turned(_normed(query, query_weight, eps, variant), cos, sin),
        _turned(_normed(key, key_weight, eps, variant), cos, sin),
    )


def _combined(angles: Tensor, sections: Sequence[int] | None) -> Tensor:
    """Combine the angles of time, height and width by sections, and add a dimension for the heads."""
    angles = angles.detach()
    if sections is not None:
        parts = angles.split_with_sizes([*sections, *sections], -1)
        angles = torch.cat([part[index % 3] for index, part in enumerate(parts)], -1)
    return angles.unsqueeze(-2)


def _normed(x: Tensor, weight: Tensor | None, eps: float, variant: str) -> Tensor:
    return x if weight is None else rms_norm.op.reference(x, weight, eps, variant)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), rest), -1)


@op(check=_check_backward)
def qk_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Sequence[int] | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `qk_norm_rope` in float32, and round them once.

    The gradient is rotated back by the angles of its token; with weights, `rms_norm_backward` follows.

    Args:
        grad_query: (..., tokens, heads, head_dim) the gradient of the first output.
        grad_key: the gradient of the second.
        query: the input of the forward, of the shape of ``grad_query``; may be None if there are no weights.
        key: likewise.
        query_weight: as in the forward.
        key_weight: as in the forward.
        cos: as in the forward.
        sin: as in the forward.
        eps: as in the forward.
        variant: as in the forward.
        sections: as in the forward.
        weight_grad: False if the weights are frozen; their gradients are then skipped.

    Returns:
        ``(grad_query, grad_key, grad_query_weight, grad_key_weight)``; the last two are (0,) if ``weight_grad`` is
        False or if there are no weights.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, sections, eps or a variant that do
            not fit.

    Source:
        The derivative of the expressions above.
    """
    cos, sin = _combined(cos, sections), _combined(sin, sections)
    grads, weights = [], []
    for grad, x, weight in ((grad_query, query, query_weight), (grad_key, key, key_weight)):
        grad_normed = _turned_back(grad, cos, sin)
        if weight is None or x is None:
            grads.append(grad_normed.to(grad.dtype))
            weights.append(grad.new_empty(0))
        else:
            grad_x, grad_weight = rms_norm_backward.op.reference(
                grad_normed, x, weight, eps, variant, None, weight_grad
            )
            grads.append(grad_x)
            weights.append(grad_weight)
    return grads[0], grads[1], weights[0], weights[1]


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate a gradient by the opposite angles, in float32 or wider."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    size = cos.shape[-1]
    grad, cos, sin = grad.to(wide), cos.to(wide), sin.to(wide)
    turned, rest = grad[..., :size], grad[..., size:]
    first, second = (turned * sin).chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((second, -first), -1), rest), -1)
