"""How rotary embedding of queries and keys is tested and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads, derived, named, partial_sums_bytes
from vlmfast.ops.rms_norm.cases import norm_module
from vlmfast.ops.rope import definition

Pair = tuple[Tensor, Tensor]

# ---- the Hugging Face code that the op replaces ----


def _upstream(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Sequence[int] | None = None,
) -> Callable[[], Pair]:
    """Make upstream's lines between the projections and the cache of an attention, with the op's output layout."""
    cos, sin = cos.detach(), sin.detach()  # models make angles under no_grad
    norms = [
        (lambda x: x) if weight is None else norm_module(weight, eps, variant) for weight in (query_weight, key_weight)
    ]
    if cos.dtype != query.dtype:
        return lambda: _turn_vision(norms[0](query), norms[1](key), cos, sin)

    def run() -> Pair:
        query_states, key_states = norms[0](query).transpose(-3, -2), norms[1](key).transpose(-3, -2)
        query_states, key_states = _turn(query_states, key_states, cos, sin, sections)
        return query_states.transpose(-3, -2), key_states.transpose(-3, -2)

    return run


def _turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sections: Sequence[int] | None) -> Pair:
    """Call the function that a model calls: Qwen3.5's rotates a part of a head, Llama's all of it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if sections is not None:  # as apply_multimodal_rotary_pos_emb of transformers 4.57, whose rest is that of Llama
        mrope_section = [*sections, *sections]
        cos = torch.cat([m[i % 3] for i, m in enumerate(cos.split_with_sizes(mrope_section, dim=-1))], dim=-1)
        sin = torch.cat([m[i % 3] for i, m in enumerate(sin.split_with_sizes(mrope_section, dim=-1))], dim=-1)
    size = cos.shape[-1]
    turned: Pair = apply_rotary_pos_emb(query[..., :size], key[..., :size], cos, sin, unsqueeze_dim=-3)
    if size == query.shape[-1]:
        return turned
    return torch.cat([turned[0], query[..., size:]], dim=-1), torch.cat([turned[1], key[..., size:]], dim=-1)


def _turn_vision(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    size, turned = cos.shape[-1], []
    for x, y in zip(
        (query, key), apply_rotary_pos_emb_vision(query[..., :size], key[..., :size], cos, sin), strict=True
    ):
        turned.append(y if size == x.shape[-1] else torch.cat([y, x[..., size:]], dim=-1))
    return turned[0], turned[1]


def _upstream_backward(*args: Any) -> Callable[[], tuple[Tensor, ...]]:
    call = named(definition.qk_norm_rope_backward, args)
    x = (call.query, call.key) if call.query is not None else (call.grad_query, call.grad_key)
    leaves = [
        value.detach().requires_grad_() for value in (*x, call.query_weight, call.key_weight) if value is not None
    ]
    query_weight, key_weight = leaves[2:] if len(leaves) == 4 else (None, None)
    rest = call.cos, call.sin, call.eps, call.variant, call.sections
    with torch.enable_grad():
        outputs = _upstream(leaves[0], leaves[1], query_weight, key_weight, *rest)()
    return lambda: torch.autograd.grad(outputs, leaves, (call.grad_query, call.grad_key), retain_graph=True)


# ---- calls to test, to refuse and to time ----

# Leading sizes, heads of queries and keys, head_dim, rotary_dim: halves that fill blocks, others, and partial rotation.
_SHAPES = [
    ((2, 3), 4, 2, 128, 128),
    ((1, 5), 3, 3, 64, 64),
    ((7,), 5, 5, 72, 72),
    ((1, 4), 9, 3, 256, 64),
    ((2, 2), 2, 1, 80, 80),
    ((3, 2), 1, 2, 16, 16),
    ((1, 1), 6, 1, 128, 128),
    ((2, 3), 2, 2, 6, 2),
    ((1, 2), 1, 1, 512, 512),
    ((0, 3), 2, 2, 64, 64),
    ((2, 3), 4, 1, 96, 40),
]
_VARIANTS = ("llama", None, "gemma", "olmo")


def _angle_tables(lead: tuple[int, ...], size: int, device: str, dtype: torch.dtype) -> Pair:
    """Make angles that are all different; in a model the two halves of a row are equal."""
    angles = torch.rand(*lead, size, device=device) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _call(
    shape: tuple[Any, ...], variant: str | None, device: str, dtype: torch.dtype, wide: bool, shared: bool
) -> tuple[Any, ...]:
    lead, heads, key_heads, head_dim, rotary_dim = shape
    query = torch.randn(*lead, heads, head_dim, device=device, dtype=dtype)
    key = torch.randn(*lead, key_heads, head_dim, device=device, dtype=dtype) * 3.0
    weights = [None if variant is None else torch.randn(head_dim, device=device, dtype=dtype) for _ in range(2)]
    rows = (1, *lead[1:]) if shared and lead[0] else lead
    return query, key, *weights, *_angle_tables(rows, rotary_dim, device, torch.float32 if wide else dtype)


def _samples(device: str, dtype: torch.dtype) -> Samples:
    for index, shape in enumerate(_SHAPES):
        variant = _VARIANTS[index % 4]
        call = _call(shape, variant, device, dtype, wide=index % 5 == 2, shared=index % 3 == 0)
        yield *call, (1e-6, 1e-5)[index % 2], variant or "gemma"
    for lead, variant in (((2, 3), None), ((1, 4), "llama")):
        query, key, *weights, _, _ = _call((lead, 4, 2, 64, 64), variant, device, dtype, wide=False, shared=False)
        tables = _angle_tables((3, *lead), 64, device, dtype)
        yield query, key, *weights, *tables, 1e-6, "llama", [8, 12, 12]
        shared = _angle_tables((3, 1, *lead[1:]), 32, device, dtype)
        yield query, key, *weights, *shared, 1e-6, "llama", [5, 0, 11]
    yield _call(((2, 3), 2, 2, 64, 64), "llama", device, dtype, wide=False, shared=False)


def _backward_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (query, key, query_weight, *rest) in enumerate(_samples(device, dtype)):
        grads = torch.randn_like(query), torch.randn_like(key)
        kept = (None, None) if query_weight is None and index % 2 else (query, key)
        tail = [*rest, *(1e-6, "llama", None)[len(rest) - 3 :]] if index % 3 == 1 else rest
        yield *grads, *kept, query_weight, *tail, *([False] if index % 3 == 1 else [])


def _workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield tokens, heads of queries and keys, and head_dim: a decoded token, a prompt with an image, a tower."""
    models = [
        ("Qwen3-VL-2B", 1, 16, 8, 128, "llama"),
        ("Qwen3-VL-2B", 600, 16, 8, 128, "llama"),
        ("Qwen2.5-VL-7B", 600, 28, 4, 128, None),
        ("Qwen2.5-VL tower", 1024, 16, 16, 80, None),
        ("Qwen3-VL-8B", 4096, 32, 8, 128, "llama"),
    ]
    for name, tokens, heads, key_heads, size, variant in models:
        tower = name.endswith("tower")
        lead = (tokens,) if tower else (1, tokens)
        call = _call((lead, heads, key_heads, size, size), variant, device, dtype, wide=tower, shared=False)
        yield f"{tokens} of {name}", call


# ---- the bytes of calls ----


def _table_bytes(cos: Tensor, sin: Tensor, sections: Sequence[int] | None = None) -> int:
    """Count both tables of angles; with three axes, each angle is read from one of them."""
    return (cos.nbytes + sin.nbytes) // (1 if sections is None else 3)


def _bytes(*args: Any) -> int:
    """Count heads, weights and angles in, heads out."""
    call = named(definition.qk_norm_rope, args)
    weights = 0 if call.query_weight is None else call.query_weight.nbytes + call.key_weight.nbytes
    heads = call.query.nbytes + call.key.nbytes
    return int(2 * heads + weights + _table_bytes(call.cos, call.sin, call.sections))


def _backward_bytes(*args: Any) -> int:
    """Count one operand in, or two with a norm, and one out; the weights' gradients with their partial sums."""
    call = named(definition.qk_norm_rope_backward, args)
    grads = call.grad_query.nbytes + call.grad_key.nbytes
    moved = 2 * grads + _table_bytes(call.cos, call.sin, call.sections)
    if call.query_weight is None:
        return int(moved)
    weights = call.query_weight.nbytes + call.key_weight.nbytes
    moved += grads + weights
    if call.weight_grad:
        size = call.grad_query.shape[-1]
        rows = call.grad_query.numel() // max(size * call.grad_query.shape[-2], 1)
        moved += weights + 2 * partial_sums_bytes(call.grad_query, size, rows)
    return int(moved)


# ---- the cases of each op ----

_QUERY, _KEY, _TABLE = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 2, 8), torch.ones(3, 1, 2, 8)
_WEIGHT = torch.ones(8)

_SHARED_BAD_CALLS = (
    ("query_weight", torch.ones(9), ValueError, r"query_weight must have shape \(8,\).*got \(9,\)"),
    ("key_weight", torch.ones(1, 8), ValueError, r"key_weight must have shape \(8,\).*got \(1, 8\)"),
    ("key_weight", None, ValueError, "query_weight and key_weight must both be .* got None for key_weight"),
    (
        "key_weight",
        _WEIGHT.half(),
        TypeError,
        "key_weight must have the dtype of .*query, torch.float32, got torch.float16",
    ),
    ("cos", torch.ones(3, 1, 3, 8), ValueError, r"cos must have shape \(3, 1, 2, rotary_dim\).*got \(3, 1, 3, 8\)"),
    ("cos", torch.ones(3, 2, 2, 8), ValueError, r"cos must have shape \(3, 1, 2, rotary_dim\).*got \(3, 2, 2, 8\)"),
    ("cos", torch.ones(3, 1, 2, 10), ValueError, "cos must have an even last size of 2 to 8, .*got 10"),
    ("cos", torch.ones(3, 1, 2, 7), ValueError, "cos must have an even last size of 2 to 8, .*got 7"),
    (
        "cos",
        _TABLE.half(),
        TypeError,
        "cos must have the dtype of .*query, torch.float32, or float32, got torch.float16",
    ),
    ("sin", torch.ones(3, 1, 2, 6), ValueError, r"sin must have the shape and dtype of cos, \(3, 1, 2, 8\)"),
    ("sections", None, ValueError, r"cos must have shape \(1, 2, rotary_dim\).*got \(3, 1, 2, 8\)"),
    ("sections", [2, 1, 2], ValueError, r"sections must be three sizes that sum to 4, .*got \[2, 1, 2\]"),
    ("sections", [2, 2], ValueError, r"sections must be three sizes that sum to 4, .*got \[2, 2\]"),
    ("sections", [5, -1, 0], ValueError, r"sections must be three sizes that sum to 4, .*got \[5, -1, 0\]"),
    ("sections", 4, TypeError, "sections must be three sizes or None, got int"),
    ("sections", [2.0, 1, 1], TypeError, "sections must be an int, got float"),
    ("eps", float("nan"), ValueError, "eps must be finite and not negative, got nan"),
    ("eps", "1e-6", TypeError, "eps must be a number, got str"),
    ("variant", "qwen", ValueError, "variant must be one of 'llama', 'gemma', 'olmo', got 'qwen'"),
)

qk_norm_rope = Cases(
    samples=_samples,
    good_call={
        "query": _QUERY,
        "key": _KEY,
        "query_weight": _WEIGHT,
        "key_weight": _WEIGHT,
        "cos": _TABLE,
        "sin": _TABLE,
        "sections": [2, 1, 1],
    },
    bad_calls=(
        *_SHARED_BAD_CALLS,
        (
            "query",
            torch.ones(2, 8),
            ValueError,
            r"query must have shape \(\.\.\., tokens, heads, head_dim\), got \(2, 8\)",
        ),
        (
            "query",
            torch.ones(1, 2, 3, 7),
            ValueError,
            "query must have a head_dim that is even and at most 512, got 7",
        ),
        ("key", torch.ones(1, 2, 2, 6), ValueError, r"key must have shape \(1, 2, heads, 8\), as query has, got"),
        ("key", torch.ones(1, 3, 2, 8), ValueError, r"key must have shape \(1, 2, heads, 8\), as query has, got"),
        ("key", _KEY.half(), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    ),
    workloads=_workloads,
    bytes=_bytes,
    flops=lambda query, key, *_: 10 * (query.numel() + key.numel()),
    upstream=_upstream,
    requested=2.5,  # each head loads the weight, and each group of threads the angles
)

qk_norm_rope_backward = derived(
    qk_norm_rope,
    lambda query, key, *rest: (torch.randn_like(query), torch.randn_like(key), query, key, *rest),
    samples=_backward_samples,
    good_call={**qk_norm_rope.good_call, "grad_query": _QUERY, "grad_key": _KEY},
    bad_calls=(
        *_SHARED_BAD_CALLS,
        ("query", None, ValueError, "query must be a tensor where there are weights, got None"),
        ("key", torch.ones(1, 2, 3, 8), ValueError, r"key must have the shape of grad_key, \(1, 2, 2, 8\)"),
        ("grad_query", torch.ones(1, 2, 3, 7), ValueError, "grad_query must have a head_dim that is even"),
    ),
    bytes=_backward_bytes,
    flops=lambda grad_query, grad_key, *_: 20 * (grad_query.numel() + grad_key.numel()),
    peers={"transformers": _upstream_backward},
    launches={"triton": 3, "emulated": 2},
    requested=2.5,
)
