"""Root-mean-square normalisation, alone and after a residual addition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN
from vlmfast.ops import bytes_moved
from vlmfast.registry import BadCall, op

VARIANTS = ("llama", "gemma")


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic: float32, or float64 where a test asks for a reference."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- what a call must look like ----


def _check(x: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> None:
    # What nearly every call brings, without the calls below.
    if (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and x.dtype in checks.DTYPES
        and weight.dtype in checks.DTYPES
        and x.is_cpu
        and weight.is_cpu
        and (shape := x.shape)  # x.size(-1) would cost twice as much
        and weight.shape == (shape[-1],)
        and type(eps) is float
        and 0.0 <= eps < math.inf
        and variant in VARIANTS
    ):
        return
    checks.float_tensor("x", x)
    checks.float_tensor("weight", weight)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight.dim() != 1 or weight.numel() != x.shape[-1]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},), the last size of x, got {tuple(weight.shape)}")
    checks.same_device("weight", weight, "x", x)
    checks.epsilon("eps", eps)
    checks.one_of("variant", variant, VARIANTS)


def _check_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> None:
    _check(x, weight, eps, variant)
    _check_twin("residual", residual, x)


def _check_twin(name: str, value: Tensor, x: Tensor) -> None:
    checks.float_tensor(name, value)
    checks.same_shape(name, value, "x", x)
    checks.same_device(name, value, "x", x)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")


def _check_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> None:
    _check(x, weight, eps, variant)
    checks.float_tensor("grad_output", grad_output)
    checks.same_shape("grad_output", grad_output, "x", x)
    checks.same_device("grad_output", grad_output, "x", x)
    if grad_residual is not None:
        _check_twin("grad_residual", grad_residual, x)


# ---- the Hugging Face code that the ops replace ----


def _norm_module(weight: Tensor, eps: float, variant: str) -> torch.nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    module: torch.nn.Module = (Qwen2RMSNorm if variant == "llama" else GemmaRMSNorm)(weight.shape[0], eps)
    if weight.requires_grad:
        del module.weight  # a parameter would be cut off from the weight's own graph
        module.weight = weight
    else:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _upstream(x: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Callable[[], Tensor]:
    module = _norm_module(weight, eps, variant)
    return lambda: module(x)


def _upstream_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama"
) -> Callable[[], tuple[Tensor, Tensor]]:
    module = _norm_module(weight, eps, variant)

    def run() -> tuple[Tensor, Tensor]:
        hidden_states = residual + x
        return module(hidden_states), hidden_states

    return run


def _upstream_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama", *_: Any
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        output = _norm_module(leaves[1], eps, variant)(leaves[0])
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def _torch_functional(x: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


# ---- calls to test, to refuse and to time ----

_SHAPES = [
    (1, 64),
    (7, 96),
    (3, 5, 128),
    (2, 3, 4, 72),
    (33, 128),
    (5, 1000),
    (2, 2048),
    (3, 3584),
    (0, 64),
    (3, 0),
    (4, 2),
    (3, 7),
    (2, 8192),
    (1, 16384),
]


def _samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for index, shape in enumerate(_SHAPES):
        x = torch.randn(shape, device=device, dtype=dtype) * (3.0 if index % 2 else 0.1)
        weight = torch.randn(shape[-1], device=device, dtype=dtype)
        yield x, weight, (1e-6, 1e-5)[index % 2], VARIANTS[index // 2 % 2]
    yield torch.randn(4, 64, device=device, dtype=dtype), torch.randn(64, device=device, dtype=dtype)
    for variant in VARIANTS:  # norms kept in float32 by mixed-precision training
        x, weight = torch.randn(2, 3, 128, device=device, dtype=dtype), torch.randn(128, device=device)
        yield x, weight, 1e-6, variant


def _add_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, *rest in _samples(device, dtype):
        yield x, torch.randn_like(x), *rest


def _backward_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for index, (x, weight, *rest) in enumerate(_samples(device, dtype)):
        tail = (None, True) if index % 3 == 0 else (torch.randn_like(x), index % 3 == 1)
        grad_output = torch.randn_like(rms_norm.op.reference(x, weight, *rest))
        yield grad_output, x, weight, *(rest or (1e-6, "llama")), *tail


def _bad_calls() -> Iterator[BadCall]:
    x, weight = torch.ones(2, 8), torch.ones(8)
    yield BadCall(([1.0], weight), TypeError, "x must be a torch.Tensor, got list")
    yield BadCall((x.double(), weight), TypeError, "x must be float32, float16 or bfloat16, got torch.float64")
    yield BadCall((x, weight.long()), TypeError, "weight must be float32, float16 or bfloat16, got torch.int64")
    yield BadCall((x[0, 0], weight), ValueError, "x must have at least one dimension")
    yield BadCall((x, torch.ones(9)), ValueError, r"weight must have shape \(8,\).*got \(9,\)")
    yield BadCall((x, torch.ones(1, 8)), ValueError, r"weight must have shape \(8,\).*got \(1, 8\)")
    yield BadCall((x, weight.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta")
    yield BadCall((x, weight, float("nan")), ValueError, "eps must be finite and not negative, got nan")
    yield BadCall((x, weight, -1.0), ValueError, "eps must be finite and not negative, got -1.0")
    yield BadCall((x, weight, "1e-6"), TypeError, "eps must be a number, got str")
    yield BadCall((x, weight, 1e-6, "qwen"), ValueError, "variant must be one of 'llama', 'gemma', got 'qwen'")


def _add_bad_calls() -> Iterator[BadCall]:
    for call in _bad_calls():
        yield BadCall((call.args[0], torch.ones(2, 8), *call.args[1:]), call.error, call.message)
    x, weight = torch.ones(2, 8), torch.ones(8)
    yield BadCall((x, torch.ones(8), weight), ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)")
    yield BadCall(
        (x, x.half(), weight), TypeError, "residual must have the dtype of x, torch.float32, got torch.float16"
    )


def _backward_bad_calls() -> Iterator[BadCall]:
    for call in _bad_calls():
        yield BadCall((torch.ones(2, 8), *call.args), call.error, call.message)
    x, weight = torch.ones(2, 8), torch.ones(8)
    yield BadCall((torch.ones(3, 8), x, weight), ValueError, r"grad_output must have the shape of x, \(2, 8\)")
    yield BadCall((x, x, weight, 1e-6, "llama", x[0]), ValueError, "grad_residual must have the shape of x")


def _workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows x hidden of Qwen3-VL-2B/8B: one decoded token, a prompt with an image, per-head q/k norms, long prompts."""
    shapes = [(1, 2048), (1, 4096), (600, 2048), (9600, 128), (4096, 4096)]
    for rows, hidden in [*shapes, (32768, 4096), (131072, 128)] if device != "cpu" else shapes:
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        yield f"{rows}x{hidden}", (x, torch.randn(hidden, device=device, dtype=dtype))


def _add_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (x, weight) in _workloads(device, dtype):
        yield label, (x, torch.randn_like(x), weight)


def _backward_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for label, (x, weight) in _workloads(device, dtype):
        yield label, (torch.randn_like(x), x, weight)


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.variant = inputs
    ctx.save_for_backward(x, weight)  # the inverse rms is cheaper to compute again than to store and load


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:  # what came after has no gradient for it
        return None, None, None, None
    x, weight = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[1]
    grad_x, grad_weight = rms_norm_backward(grad_output, x, weight, ctx.eps, ctx.variant, None, weight_grad)
    return grad_x, grad_weight if weight_grad else None, None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.variant = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad_output: Tensor | None, grad_residual: Tensor | None) -> tuple[Any, ...]:
    hidden_states, weight = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[2]
    if grad_output is None:  # only the new residual was used
        return grad_residual, grad_residual, None, None, None
    grad_x, grad_weight = rms_norm_backward(
        grad_output, hidden_states, weight, ctx.eps, ctx.variant, grad_residual, weight_grad
    )
    return grad_x, grad_x, grad_weight if weight_grad else None, None, None


# ---- the definitions ----


@op(
    check=_check,
    upstream=_upstream,
    peers={"F.rms_norm": _torch_functional},
    samples=_samples,
    bad_calls=_bad_calls,
    workloads=_workloads,
    bytes=lambda x, weight, *_: 2 * x.nbytes + weight.nbytes,
    flops=lambda x, *_: 4 * x.numel(),
    setup_context=_setup_context,
    backward=_backward,
)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama") -> Tensor:
    """Divide each row by its root mean square and multiply it by a weight.

    The mean square is taken in float32. "llama" rounds the quotient to the dtype of ``x`` before the weight;
    "gemma" multiplies by ``1 + weight`` in float32 and rounds once::

        llama:  weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(x.dtype)
        gemma:  (x32 * rsqrt(mean(x32 ** 2) + eps) * (1 + weight32)).to(x.dtype)

    Args:
        x: (..., D) float32, float16 or bfloat16; any strides.
        weight: (D,) float32, float16 or bfloat16.
        eps: added to the mean square; finite, not negative.
        variant: "llama" or "gemma".

    Returns:
        (..., D) contiguous; of the dtype of ``x``, or for "llama" of the wider of the two dtypes.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        Qwen2RMSNorm.forward ("llama") and GemmaRMSNorm.forward ("gemma") of transformers 5.23.
    """
    x32 = _wide(x)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if variant == "gemma":
        return (normed * (1.0 + _wide(weight))).to(x.dtype)
    return weight * normed.to(x.dtype)


@op(
    check=_check_add,
    upstream=_upstream_add,
    samples=_add_samples,
    bad_calls=_add_bad_calls,
    workloads=_add_workloads,
    bytes=lambda x, residual, weight, *_: 4 * x.nbytes + weight.nbytes,
    flops=lambda x, *_: 5 * x.numel(),
    setup_context=_add_setup_context,
    backward=_add_backward,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, variant: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    ``new_residual = residual + x``, rounded to the dtype, then ``y = rms_norm(new_residual, weight, eps, variant)``.

    Args:
        x: (..., D) float32, float16 or bfloat16; any strides.
        residual: (..., D) of the shape and dtype of ``x``.
        weight: (D,) float32, float16 or bfloat16.
        eps: added to the mean square; finite, not negative.
        variant: "llama" or "gemma".

    Returns:
        ``(y, new_residual)``, each (..., D) and contiguous.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        Qwen2DecoderLayer.forward of transformers 5.23: ``residual + hidden_states``, then ``post_attention_layernorm``.
    """
    new_residual = residual + x
    return rms_norm.op.reference(new_residual, weight, eps, variant), new_residual


@op(
    check=_check_backward,
    peers={"transformers": _upstream_backward},
    samples=_backward_samples,
    bad_calls=_backward_bad_calls,
    workloads=_backward_workloads,
    bytes=bytes_moved.rms_norm_backward,
    flops=lambda grad_output, x, *_: 12 * x.numel(),
)
def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of `rms_norm` and, with ``grad_residual``, of `add_rms_norm`, in float32 and rounded once.

    With ``r = rsqrt(mean(x ** 2) + eps)``, ``n = x * r`` and ``g = grad_output * weight`` (gemma: ``1 + weight``)::

        grad_x = r * (g - n * mean(g * n)) + grad_residual
        grad_weight = sum over rows of grad_output * n      (llama: n rounded to the dtype of x, as in the forward)

    Args:
        grad_output: (..., D) the gradient of the output.
        x: (..., D) what was normalised.
        weight: (D,) the weight.
        eps: as in the forward.
        variant: as in the forward.
        grad_residual: (..., D) the gradient of `add_rms_norm`'s second output, or None.
        weight_grad: False where the weight is frozen; its gradient is then skipped.

    Returns:
        ``(grad_x, grad_weight)``: (..., D) of the dtype of ``x``, and (D,) of the dtype of ``weight``, or (0,) where
        ``weight_grad`` is False.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        The derivative of the expressions above.
    """
    x32, grad32 = _wide(x), _wide(grad_output)
    inverse_rms = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    normed = x32 * inverse_rms
    scaled = grad32 * (1.0 + _wide(weight) if variant == "gemma" else _wide(weight))
    grad_x = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + _wide(grad_residual)
    if not weight_grad:
        return grad_x.to(x.dtype), weight.new_empty(0)
    if variant == "llama":
        normed = _wide(normed.to(x.dtype))
    return grad_x.to(x.dtype), (grad32 * normed).sum_to_size(weight.shape).to(weight.dtype)
