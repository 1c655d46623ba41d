"""How RMSNorm is tested and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Preparation, Samples, Workloads, derived, named, partial_sums_bytes
from vlmfast.ops.rms_norm import definition
from vlmfast.ops.rms_norm.definition import VARIANTS

# ---- the Hugging Face code that the ops replace ----


def norm_module(weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama", *_: Any) -> torch.nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    module: torch.nn.Module
    if weight is None:
        module = Llama4TextL2Norm(eps)  # the body of NanoChatRMSNorm, which transformers 4.57 lacks
        return module
    module = {"llama": Qwen2RMSNorm, "gemma": GemmaRMSNorm, "olmo": Olmo2RMSNorm}[variant](weight.shape[0], eps)
    del module.weight  # assigned as a tensor below: a parameter would detach the weight
    module.weight = weight if weight.requires_grad else torch.nn.Parameter(weight, requires_grad=False)
    return module


def _upstream(x: Tensor, *norm: Any) -> Callable[[], Tensor]:
    module = norm_module(*norm)
    return lambda: module(x)


def _upstream_add(x: Tensor, residual: Tensor, *norm: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    module = norm_module(*norm)

    def run() -> tuple[Tensor, Tensor]:
        hidden_states = residual + x
        return module(hidden_states), hidden_states

    return run


def _upstream_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None = None, *norm: Any
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [value.detach().requires_grad_() for value in (x, weight) if value is not None]
    with torch.enable_grad():
        output = norm_module(leaves[1] if len(leaves) == 2 else None, *norm)(leaves[0])
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)


def _torch_functional(x: Tensor, weight: Tensor, eps: float = 1e-6, *_: Any) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _torch_functional_add(x: Tensor, residual: Tensor, *norm: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        hidden_states = residual + x
        return _torch_functional(hidden_states, *norm)(), hidden_states

    return run


# ---- the kernels of other projects, each called in its fastest documented way; forward only ----


def _liger(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama"
) -> Callable[[], Any]:
    from liger_kernel.ops import fused_add_rms_norm, rms_norm

    rest = weight, eps, float(variant == "gemma"), variant, False
    if residual is None:
        return functools.partial(rms_norm.LigerRMSNormFunction.apply, x, *rest)
    return functools.partial(fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply, x, residual, *rest)


def _quack(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama"
) -> Callable[[], Any]:
    from quack.rmsnorm import rmsnorm

    norm = functools.partial(rmsnorm, x, weight, eps=eps, weight_offset=float(variant == "gemma"))
    return norm if residual is None else functools.partial(norm, residual=residual, prenorm=True)


def _flashinfer(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, variant: str = "llama"
) -> Callable[[], Any]:
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    if variant != "llama":
        raise ValueError(f"flashinfer has no call for the variant {variant} here")
    if residual is None:
        return functools.partial(rmsnorm, x, weight, eps)

    def run() -> tuple[Tensor, Tensor]:
        y, hidden = x.clone(), residual.clone()  # the kernel overwrites both; a caller that keeps them copies them
        fused_add_rmsnorm(y, hidden, weight, eps)
        return y, hidden

    return run


def _norm_function(weight: Tensor) -> Callable[[Tensor], Tensor]:
    norm = definition.rms_norm
    return lambda hidden_states: norm(hidden_states, weight)


def _layers(norm: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Run eight layers of a residual addition, the norm and a scaling."""

    def run() -> Tensor:
        hidden_states = residual = x
        for _ in range(8):
            residual = residual + hidden_states
            hidden_states = norm(residual) * 0.5
        return hidden_states

    return run


_PROJECTS = {"liger": _liger, "quack": _quack, "flashinfer": _flashinfer}


def _without_residual(prepare: Preparation) -> Preparation:
    return lambda x, *rest: prepare(x, None, *rest)


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
    (4, 2),
    (3, 7),
    (3, 1552),
    (2, 1536),
    (2, 8192),
    (1, 16384),
    (0, 64),
    (3, 0),
]


def _samples(device: str, dtype: torch.dtype) -> Samples:
    variants = ("llama", None, "gemma", "olmo")  # None: without a weight
    for index, shape in enumerate(_SHAPES):
        # each shape with one variant; every four shapes it moves on, so that each meets large and small numbers
        variant = variants[(index + index // 4) % 4]
        x = torch.randn(shape, device=device, dtype=dtype) * (3.0 if index % 2 else 0.1)
        weight = None if variant is None else torch.randn(shape[-1], device=device, dtype=dtype)
        yield x, weight, (1e-6, 1e-5)[index % 2], variant or "gemma"
    yield (torch.randn(4, 64, device=device, dtype=dtype),)
    # more rows than the backward's programs prefetch at first, when there are a few
    yield torch.randn(17, 2000, device=device, dtype=dtype), torch.randn(2000, device=device, dtype=dtype)
    for variant in VARIANTS:  # float32 weights, as mixed-precision training keeps them
        x, weight = torch.randn(2, 3, 128, device=device, dtype=dtype), torch.randn(128, device=device)
        yield x, weight, 1e-6, variant


def _backward_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (x, *rest) in enumerate(_samples(device, dtype)):
        grad_output = torch.randn_like(definition.rms_norm.op.reference(x, *rest))
        turn = index // 4 % 3  # the variants alternate within four
        tail = (None, True) if turn == 0 else (torch.randn_like(x), turn == 1)
        yield grad_output, x, *rest, *(tail if len(rest) == 3 else ())


def _workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield rows x hidden of Qwen3-VL-2B/8B: a decoded token, a prompt with an image, per-head norms, long prompts.

    Two sizes are not multiples of 16: the heads of its tower, and patches.
    """
    shapes = [(1, 2048), (1, 4096), (600, 2048), (9600, 128), (9600, 72), (600, 1176), (4096, 4096)]
    for rows, hidden in [*shapes, (32768, 4096), (131072, 128)] if device != "cpu" else shapes:
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        yield f"{rows}x{hidden}", (x, torch.randn(hidden, device=device, dtype=dtype))


# ---- the bytes of calls ----


def _norm_bytes(x: Tensor, weight: Tensor | None = None, *_: Any) -> int:
    """Count ``x`` and the weight in, the output out."""
    return 2 * x.nbytes + (0 if weight is None else weight.nbytes)


def _add_bytes(x: Tensor, residual: Tensor, weight: Tensor | None = None, *_: Any) -> int:
    """Count both operands and the weight in, both outputs out."""
    return 2 * x.nbytes + _norm_bytes(x, weight)


def _backward_bytes(*args: Any) -> int:
    """Count two operands in and one out; the residual's gradient, if any; the weight's, with its partial sums."""
    call = named(definition.rms_norm_backward, args)
    moved = int(call.x.nbytes) + sum(value.nbytes for value in args if isinstance(value, Tensor))
    if call.weight is None or not call.weight_grad:
        return moved
    size = call.weight.shape[0]
    return moved + int(call.weight.nbytes) + partial_sums_bytes(call.x, size, call.x.numel() // max(size, 1))


# ---- the cases of each op ----

_X, _WEIGHT = torch.ones(2, 8), torch.ones(8)

rms_norm = Cases(
    samples=_samples,
    good_call={"x": _X, "weight": _WEIGHT},
    bad_calls=(
        ("x", _X[0, 0], ValueError, "x must have at least one dimension"),
        ("weight", torch.ones(9), ValueError, r"weight must have shape \(8,\).*got \(9,\)"),
        ("weight", torch.ones(1, 8), ValueError, r"weight must have shape \(8,\).*got \(1, 8\)"),
        ("eps", float("nan"), ValueError, "eps must be finite and not negative, got nan"),
        ("eps", -1.0, ValueError, "eps must be finite and not negative, got -1.0"),
        ("eps", "1e-6", TypeError, "eps must be a number, got str"),
        ("variant", "qwen", ValueError, "variant must be one of 'llama', 'gemma', 'olmo', got 'qwen'"),
    ),
    workloads=_workloads,
    bytes=_norm_bytes,
    flops=lambda x, *_: 4 * x.numel(),
    upstream=_upstream,
    peers={"F.rms_norm": _torch_functional},
    projects={name: _without_residual(prepare) for name, prepare in _PROJECTS.items()},
    layers={
        "vlmfast": lambda x, weight: _layers(_norm_function(weight), x),
        "transformers": lambda x, weight: _layers(norm_module(weight), x),
    },
    requested=1.55,  # each row of 2048 loads the weight, which has as many bytes
)

add_rms_norm = derived(
    rms_norm,
    lambda x, *rest: (x, torch.randn_like(x), *rest),
    good_call={**rms_norm.good_call, "residual": _X},
    bad_calls=(
        *rms_norm.bad_calls,
        ("residual", _X[0], ValueError, r"residual must have the shape of x, \(2, 8\), got \(8,\)"),
        ("residual", _X.half(), TypeError, "residual must have the dtype of x, torch.float32, got torch.float16"),
    ),
    bytes=_add_bytes,
    flops=lambda x, *_: 5 * x.numel(),
    upstream=_upstream_add,
    peers={"F.rms_norm": _torch_functional_add},
    projects=_PROJECTS,
    requested=1.3,  # each row loads the weight
)

rms_norm_backward = derived(
    rms_norm,
    lambda x, weight: (torch.randn_like(x), x, weight),
    samples=_backward_samples,
    good_call={**rms_norm.good_call, "grad_output": _X},
    bad_calls=(
        *rms_norm.bad_calls,
        ("grad_output", torch.ones(3, 8), ValueError, r"grad_output must have the shape of x, \(2, 8\)"),
        ("grad_residual", _X[0], ValueError, "grad_residual must have the shape of x"),
    ),
    bytes=_backward_bytes,
    flops=lambda grad_output, x, *_: 12 * x.numel(),
    peers={"transformers": _upstream_backward},
    launches=2,
    requested=1.7,  # each row loads the weight in both passes
)
