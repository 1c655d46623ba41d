"""Rotary embedding of queries and keys, with the norms of their heads, in Triton. Each head is read once."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import (
    MAX_EXTENT,
    Config,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    processors,
)
from vlmfast.kernels.common.partial_sums import sum_partials
from vlmfast.kernels.rope.backward import qk_norm_rope_backward_kernel
from vlmfast.kernels.rope.forward import qk_norm_rope_kernel


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """The tile of a program: heads x (the two rotated halves and the rest), whose sizes are fixed by the model."""

    enable_fp_fusion: bool = False  # products with cos and sin are rounded before they are added
    HALF: int
    REST: int
    BLOCK_HEADS: int
    BLOCK_HALF: int
    BLOCK_REST: int


@functools.lru_cache
def rope_config_for(heads: int, head_dim: int, rotary_dim: int) -> RopeConfig:
    """Choose 16 elements per thread: a 16-byte load from each half for bfloat16."""
    rest = head_dim - rotary_dim
    columns = 2 * next_power_of_two(rotary_dim // 2) + (next_power_of_two(rest) if rest else 0)
    most = max(1, 2048 // next_power_of_two(columns))
    return RopeConfig(
        HALF=rotary_dim // 2,
        REST=rest,
        BLOCK_HEADS=min(most, next_power_of_two(heads)),
        BLOCK_HALF=next_power_of_two(rotary_dim // 2),
        BLOCK_REST=next_power_of_two(max(rest, 1)),
        num_warps=4,
    )


def unsupported(query: Tensor, key: Tensor, *_: Any) -> str | None:
    rows = query.numel() // max(1, query.shape[-1] * query.shape[-2])
    if rows * max(query.shape[-2], key.shape[-2]) >= MAX_EXTENT:
        return f"query has {rows} rows of {query.shape[-2]} heads, together {MAX_EXTENT} or more"
    return device_unsupported(query)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    sections: Any = None,
) -> tuple[Tensor, Tensor]:
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    if query.numel() + key.numel() == 0:
        return outputs
    query, key, cos, sin = _heads(query), _heads(key), _angles(cos), _angles(sin)
    query_weight, key_weight = _contiguous(query_weight), _contiguous(key_weight)
    rows, query_heads, head_dim = query.shape
    key_heads = key.shape[1]
    config = rope_config_for(max(query_heads, key_heads), head_dim, cos.shape[1])
    blocks = ceil_div(query_heads, config.BLOCK_HEADS) + ceil_div(key_heads, config.BLOCK_HEADS)
    with on_device(query):
        qk_norm_rope_kernel[(rows, blocks)](
            *(query, key, query_weight, key_weight, cos, sin, *outputs),
            *(*query.stride()[:2], query_heads, *key.stride()[:2], key_heads, cos.stride(0), sin.stride(0)),
            *(*_sections(cos, sections), eps, *_order(query, query_weight, variant, sections)),
            ALIGNED=alignment(*query.stride()[:2], *key.stride()[:2], cos.stride(0), sin.stride(0)),
            **vars(config),
        )
    return outputs


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
    sections: Any = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = grad_query.new_empty(grad_query.shape), grad_key.new_empty(grad_key.shape)
    size = grad_query.shape[-1]
    weight_grad = weight_grad and query_weight is not None
    if grad_query.numel() + grad_key.numel() == 0:
        return *outputs, *(grad_query.new_zeros(size if weight_grad else 0) for _ in range(2))
    grad_query, grad_key, cos, sin = _heads(grad_query), _heads(grad_key), _angles(cos), _angles(sin)
    query, key = (None if query_weight is None else _heads(x) for x in (query, key))
    query_weight, key_weight = _contiguous(query_weight), _contiguous(key_weight)
    rows, query_heads, _ = grad_query.shape
    key_heads = grad_key.shape[1]
    config = rope_config_for(max(query_heads, key_heads), size, cos.shape[1])
    programs = min(rows * ceil_div(max(query_heads, key_heads), config.BLOCK_HEADS), 2 * processors(grad_query))
    partials = [grad_query.new_empty(programs, size, dtype=torch.float32) if weight_grad else None for _ in range(2)]
    strides = [
        (*grad.stride()[:2], *((0, 0) if x is None else x.stride()[:2]), heads)
        for grad, x, heads in ((grad_query, query, query_heads), (grad_key, key, key_heads))
    ]
    with on_device(grad_query):
        qk_norm_rope_backward_kernel[(programs, 2)](
            *(grad_query, grad_key, query, key, query_weight, key_weight, cos, sin, *outputs, *partials),
            *(*strides[0], *strides[1], cos.stride(0), sin.stride(0), *_sections(cos, sections), rows, eps),
            *_order(grad_query, query_weight, variant, sections),
            ALIGNED=alignment(*strides[0][:4], *strides[1][:4], cos.stride(0), sin.stride(0)),
            **vars(config),
        )
    if not weight_grad:
        return *outputs, *(grad_query.new_empty(0) for _ in range(2))
    return *outputs, *(sum_partials(partial, grad_query.dtype) for partial in partials)


def _heads(x: Tensor) -> Tensor:
    """View ``x`` as (rows, heads, head_dim) with contiguous heads; copies it if its strides do not allow that."""
    return _contiguous_last(x.flatten(0, -3))


def _angles(angles: Tensor) -> Tensor:
    """View the angles as rows, with the axes one after another."""
    return _contiguous_last(angles.flatten(0, -2))


def _contiguous_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _sections(cos: Tensor, sections: Any) -> tuple[int, int, int]:
    """Return the number of rows per axis, and the first frequencies of the second and the third section."""
    if sections is None:
        return cos.shape[0], 0, 0
    return cos.shape[0] // 3, sections[0], sections[0] + sections[1]


def _order(x: Tensor, weight: Tensor | None, variant: str, sections: Any) -> tuple[float, bool, bool]:
    """Return the offset of the weight, whether there are sections, and whether heads are rounded before the weight."""
    rounded = variant == "llama" and weight is not None and x.dtype != torch.float32
    return 1.0 if variant == "gemma" else -0.0, sections is not None, rounded  # -0.0 changes no number
