"""Attention of decoders: `vlmfast.qk_norm_rope` between the projections and the cache.

The projections stay the module's own, so that adapters, quantised projections and hooks work; of a bare `nn.Linear`
only the matmul is called, not the module. The norms of queries and keys are part of the op where they are known norms
without hooks; otherwise they are called as modules. The cache, the attention function and its arguments are upstream's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.backends import PLAIN
from vlmfast.checks import DTYPES
from vlmfast.modules import child, is_bare, project, project_all
from vlmfast.ops.rope import qk_norm_rope
from vlmfast.ops.rope.definition import MAX_HEAD_DIM
from vlmfast.patches.residual import NORMS
from vlmfast.patches.sdpa import attend_alone, implementation_of
from vlmfast.patches.upstream import names_of

Attended = tuple[Tensor, "Tensor | None"]
Told = Callable[[Any], dict[str, Any]]


# ---- arguments of the attention function that only some models pass ----


def nothing(self: Any) -> dict[str, Any]:
    """Return no further arguments: Llama, Qwen3-VL."""
    return {}


def window(self: Any) -> dict[str, Any]:
    """Return the sliding window of the layer, None in layers without one: Qwen2, Qwen3, Gemma 3."""
    return {"sliding_window": self.sliding_window}


def configured_window(self: Any) -> dict[str, Any]:
    """Return the sliding window of the configuration, which holds for all layers: Mistral."""
    return {"sliding_window": getattr(self.config, "sliding_window", None)}


def capped_window(self: Any) -> dict[str, Any]:
    """Return the sliding window and the cap of the logits: Gemma 2."""
    return {"sliding_window": self.sliding_window, "softcap": self.attn_logit_softcapping}


# ---- replacements: each factory makes a function whose parameters are those of some upstream bodies ----


@dataclass(frozen=True)
class Kind:
    """How one attention differs from another.

    Attributes:
        told: returns the arguments of the attention function that only some models pass.
        normed: queries and keys are normalised by ``q_norm`` and ``k_norm``.
        gated: the query projection also computes a gate for the output.
    """

    told: Told = nothing
    normed: bool = False
    gated: bool = False


def attends(told: Told = nothing, **differences: bool) -> Callable[..., Any]:
    """Make the replacement of a body such as Qwen3VLTextAttention.forward."""
    kind = Kind(told, **differences)

    def attend(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Attended:
        return _attend(self, kind, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)

    return _of_kind(attend, kind)


def attends_optional(told: Told = nothing, **differences: bool) -> Callable[..., Any]:
    """Make the replacement of a body such as LlamaAttention.forward, all of whose parameters have defaults."""
    kind = Kind(told, **differences)

    def attend(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Attended:
        return _attend(self, kind, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)

    return _of_kind(attend, kind)


def attends_cached(told: Told = nothing, **differences: bool) -> Callable[..., Any]:
    """Make the replacement of a body of transformers 4.57, which passes cos, sin and positions to the cache."""
    kind = Kind(told, **differences)

    def attend(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        cache_position: Any = None,
        **kwargs: Any,
    ) -> Attended:
        cached = {"cache_position": cache_position}
        return _attend(self, kind, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs, cached)

    return _of_kind(attend, kind)


def qwen2_vl_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Attended:
    """Replace Qwen2VLAttention.forward, which passes ``position_ids`` on to the attention function."""
    kwargs = {"position_ids": position_ids, **kwargs}
    return _attend(self, _WINDOWED, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs)


def qwen2_vl_attention_457(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    cache_position: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Attended:
    """Replace Qwen2VLAttention.forward of transformers 4.57, whose cos and sin have one part per axis of M-RoPE."""
    kwargs, cached = {"position_ids": position_ids, **kwargs}, {"cache_position": cache_position}
    sections = self.rope_scaling["mrope_section"]
    return _attend(
        self, _WINDOWED, hidden_states, position_embeddings, attention_mask, past_key_values, kwargs, cached, sections
    )


_WINDOWED = Kind(window)
_NO_NORMS = "llama", 0.0, None, None  # as of `_fusable`


def _of_kind(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """Let `Patch.report` ask a replacement with norms why it does not fuse those of a module."""
    if kind.normed:
        function.unfused = unfused_norms  # type: ignore[attr-defined]
    return function


def unfused_norms(module: Any) -> str | None:
    """Say why the norms of queries and keys are called as modules; None where they are part of the op."""
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name)
        if type(norm).forward not in NORMS:
            return f"{name} is a {type(norm).__name__} whose forward is not replaced"
        if not is_bare(norm):
            return f"{name} has a hook or a forward of its own"
    dtype = module.q_norm.weight.dtype
    if _fusable(module.q_norm, module.k_norm, dtype) is None:
        return "q_norm and k_norm differ in more than the numbers of their weights"
    return None


# ---- the body that all replacements share ----


def _attend(
    self: Any,
    kind: Kind,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Any,
    past_key_values: Any,
    kwargs: dict[str, Any],
    cached: dict[str, Any] | None = None,
    sections: Any = None,
) -> Attended:
    """Attend to the tokens as upstream does.

    Args:
        self: the attention module.
        kind: how this attention differs from others.
        hidden_states: (B, T, D).
        position_embeddings: cos and sin.
        attention_mask: as the attention function takes it.
        past_key_values: the cache, or None.
        kwargs: further arguments of the attention function.
        cached: what the cache is told besides cos and sin (transformers 4.57); None where it is told neither.
        sections: sizes of the M-RoPE sections where cos and sin still have an axis for them; None elsewhere.

    Returns:
        The output (B, T, D) and the attention weights, as the attention function returns them.
    """
    (batch, tokens, _), size, gate = hidden_states.shape, self.head_dim, None
    query, key, value = project_all(self, ("q_proj", "k_proj", "v_proj"), hidden_states)
    if kind.gated:
        query, gate = torch.chunk(query.view(batch, tokens, -1, 2 * size), 2, dim=-1)
        gate = gate.reshape(batch, tokens, -1)
    else:
        query = query.view(batch, tokens, -1, size)  # a tuple of sizes would cost 0.7 us
    key = key.view(batch, tokens, -1, size)
    alone = type(tokens) is int and tokens == 1  # torch.jit traces sizes as tensors
    value_states = value.view(batch, -1, 1, size) if alone else value.view(key.shape).transpose(1, 2)

    cos, sin = position_embeddings
    query_states, key_states = _positioned(self, query, key, cos, sin, kind.normed, sections)
    if past_key_values is not None:
        angles = () if cached is None else ({"sin": sin, "cos": cos, **cached},)
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx, *angles)

    interface, output, weights = _interface(self, cached is not None), None, None
    dropout = self.attention_dropout if self.training else 0.0
    if alone and attention_mask is None and kind.told is not capped_window:
        output = attend_alone(self, interface, query_states, key_states, value_states, dropout, kwargs)
    if output is None:
        output, weights = interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kind.told(self),
            **kwargs,
        )
        output = output.reshape(batch, tokens, -1).contiguous()
    if gate is not None:
        output = output * torch.sigmoid(gate)
    return project(self, "o_proj", output), weights


def _positioned(
    self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, normed: bool, sections: Any
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, apply RoPE, and return them as (B, H, T, head_dim) views of (B, T, H, head_dim)."""
    dtype = query.dtype
    if dtype in DTYPES and cos.dtype == dtype and query.shape[-1] <= MAX_HEAD_DIM:
        how = _fusable(child(self, "q_norm"), child(self, "k_norm"), dtype) if normed else _NO_NORMS
        if how is None:
            query, key, how = self.q_norm(query), self.k_norm(key), _NO_NORMS
        variant, eps, query_weight, key_weight = how
        query, key = qk_norm_rope(query, key, query_weight, key_weight, cos, sin, eps, variant, sections)
        return query.transpose(1, 2), key.transpose(1, 2)
    if normed:
        query, key = self.q_norm(query), self.k_norm(key)
    name = "apply_rotary_pos_emb" if sections is None else "apply_multimodal_rotary_pos_emb"
    turn = _names_of(self)[name]
    angles = (cos, sin) if sections is None else (cos, sin, sections)
    turned: tuple[Tensor, Tensor] = turn(query.transpose(1, 2), key.transpose(1, 2), *angles)
    return turned


def _fusable(query_norm: Any, key_norm: Any, dtype: torch.dtype) -> tuple[str, float, Tensor, Tensor] | None:
    """Return variant, eps and weights of two norms that the op can compute, or None where it cannot."""
    cls = type(query_norm)
    order = NORMS.get(cls.forward)
    if order is None or type(key_norm) is not cls or not (is_bare(query_norm) and is_bare(key_norm)):
        return None
    name, variant = order
    eps = getattr(query_norm, name)
    query_weight = query_norm.__dict__["_parameters"].get("weight")
    key_weight = key_norm.__dict__["_parameters"].get("weight")
    same = type(query_weight) in PLAIN and type(key_weight) in PLAIN
    if not same or query_weight.dtype != dtype or key_weight.dtype != dtype or getattr(key_norm, name) != eps:
        return None
    return variant, eps, query_weight, key_weight


def _names_of(module: Any) -> dict[str, Any]:
    """Return the globals of the modelling file that defines the class of an attention module."""
    cls: Any = type(module)
    return _globals(getattr(cls, "original_class", cls))


@functools.cache
def _globals(cls: type) -> dict[str, Any]:
    return names_of(cls, "forward")


def _interface(module: Any, is_457: bool) -> Callable[..., Any]:
    """Look up the attention function as upstream does."""
    names = _names_of(module)
    functions, implementation = names["ALL_ATTENTION_FUNCTIONS"], implementation_of(module.config)
    if implementation == "sdpa":  # the lines below find the same, and take the host 1 us
        return functions["sdpa"]  # type: ignore[no-any-return]
    eager = names["eager_attention_forward"]
    if is_457:
        return eager if implementation == "eager" else functions[implementation]  # type: ignore[no-any-return]
    return functions.get_interface(implementation, eager)  # type: ignore[no-any-return]
