"""How `silu_mul` is tested and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads, derived
from vlmfast.ops.silu_mul import definition
from vlmfast.ops.silu_mul.definition import ACTIVATIONS

# ---- the Hugging Face code that the op replaces, and the kernels of other projects ----


def _activated(gate: Tensor, up: Tensor, activation: str = "silu") -> Callable[[], Tensor]:
    from transformers.activations import ACT2FN

    act_fn = ACT2FN["silu" if activation == "silu" else "gelu_pytorch_tanh"]
    return lambda: act_fn(gate) * up


def _activated_backward(grad_output: Tensor, *args: Any) -> Callable[[], tuple[Tensor, ...]]:
    gate, up = (value.detach().requires_grad_() for value in args[:2])
    with torch.enable_grad():
        output = _activated(gate, up, *args[2:])()
    return lambda: torch.autograd.grad(output, (gate, up), grad_output, retain_graph=True)


def _liger(gate: Tensor, up: Tensor, activation: str = "silu") -> Callable[[], Any]:
    from liger_kernel.ops import geglu, swiglu

    function = swiglu.LigerSiLUMulFunction if activation == "silu" else geglu.LigerGELUMulFunction
    return functools.partial(function.apply, gate, up)


# ---- calls to test, to refuse and to time ----

_SHAPES = [(1, 64), (7, 96), (3, 5, 128), (2, 3, 4, 72), (33, 128), (5, 1000), (3, 2000), (0, 64), (3, 0), (3, 7)]
_SHAPES += [(70,), (2, 8200)]


def _samples(device: str, dtype: torch.dtype) -> Samples:
    for index, shape in enumerate(_SHAPES):
        gate = torch.randn(shape, device=device, dtype=dtype) * (3.0 if index % 2 else 0.5)
        yield gate, torch.randn(shape, device=device, dtype=dtype), ACTIVATIONS[index // 2 % 2]
    # from where the exponential underflows to where it overflows
    yield torch.linspace(-110, 110, 6144, device=device).to(dtype).view(3, -1), torch.ones(3, 2048).to(device, dtype)
    fused = torch.randn(3, 2, 192, device=device, dtype=dtype)
    yield fused.chunk(2, dim=-1)


def _workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield rows x intermediate of Qwen3-VL-2B/8B: 1 token, 64, a prompt with an image, a long one; Phi-3's halves."""
    shapes = [(1, 6144), (1, 12288), (64, 6144), (600, 6144), (4096, 12288)]
    for rows, size in shapes[: 4 if device == "cpu" else 5]:
        gate = torch.randn(rows, size, device=device, dtype=dtype)
        yield f"{rows}x{size}", (gate, torch.randn_like(gate))
    fused = torch.randn(600, 16384, device=device, dtype=dtype)
    yield "600x8192 fused", fused.chunk(2, dim=-1)
    gate = torch.randn(600, 6144, device=device, dtype=dtype)
    yield "600x6144 gelu_tanh", (gate, torch.randn_like(gate), "gelu_tanh")


# ---- the cases of each op ----

_GATE = torch.ones(2, 8)

silu_mul = Cases(
    samples=_samples,
    good_call={"gate": _GATE, "up": _GATE},
    bad_calls=(
        ("gate", _GATE[0, 0], ValueError, "gate must have at least one dimension, got a scalar"),
        ("up", _GATE[0], ValueError, r"up must have the shape of gate, \(2, 8\), got \(8,\)"),
        ("up", _GATE.half(), TypeError, "up must have the dtype of gate, torch.float32, got torch.float16"),
        ("activation", "gelu", ValueError, "activation must be one of 'silu', 'gelu_tanh', got 'gelu'"),
    ),
    workloads=_workloads,
    bytes=lambda gate, up, *_: 3 * int(gate.nbytes),
    flops=lambda gate, *_: 5 * int(gate.numel()),
    upstream=_activated,
    projects={"liger": _liger},
    same_bits=False,
)

silu_mul_backward = derived(
    silu_mul,
    lambda gate, up, *rest: (torch.randn_like(definition.silu_mul.op.reference(gate, up)), gate, up, *rest),
    good_call={**silu_mul.good_call, "grad_output": _GATE},
    bad_calls=(
        *silu_mul.bad_calls,
        ("grad_output", torch.ones(3, 8), ValueError, r"grad_output must have the shape of gate, \(2, 8\)"),
    ),
    bytes=lambda grad_output, *_: 5 * int(grad_output.nbytes),
    flops=lambda grad_output, *_: 12 * int(grad_output.numel()),
    peers={"transformers": _activated_backward},
)
