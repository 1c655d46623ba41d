"""Decoder layers in which each residual addition and the norm behind it are one launch.

All modules of the layer stay its own. The bodies differ only in their parameters, which each hands on to its attention.
Each is written out: it runs for every layer of every token, and binding arguments by a list of names would be slower.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from vlmfast.modules import is_bare, run_of
from vlmfast.patches.residual import FOLLOWING, Following, add_before_next, add_then_norm, normalise, obstacle


def llama_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replace LlamaDecoderLayer.forward and its copies."""
    kwargs.update(
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
    )
    return _pre_norm(self, hidden_states, kwargs)


def qwen3_vl_layer(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    **kwargs: Any,
) -> Tensor:
    """Replace Qwen3VLTextDecoderLayer.forward: as Llama's, with its parameters in another order."""
    kwargs.update(
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
    )
    return _pre_norm(self, hidden_states, kwargs)


def llama_layer_457(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    cache_position: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replace LlamaDecoderLayer.forward of transformers 4.57."""
    kwargs.update(
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        cache_position=cache_position,
        position_embeddings=position_embeddings,
    )
    return _pre_norm(self, hidden_states, kwargs)


def qwen3_vl_layer_457(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    cache_position: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replace Qwen3VLTextDecoderLayer.forward of transformers 4.57."""
    kwargs.update(
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        cache_position=cache_position,
        position_embeddings=position_embeddings,
    )
    return _pre_norm(self, hidden_states, kwargs)


def qwen2_vl_layer_457(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    output_attentions: Any = False,
    use_cache: Any = False,
    cache_position: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Replace Qwen2VLDecoderLayer.forward of transformers 4.57, which returns the attention weights as well."""
    residual = hidden_states
    hidden_states = normalise(self, "input_layernorm", hidden_states)
    run, attention = run_of(self, "self_attn")
    hidden_states, weights = run(
        attention,
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        output_attentions=output_attentions,
        use_cache=use_cache,
        cache_position=cache_position,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = _feed_forward(self, residual, hidden_states)
    return (hidden_states, weights) if output_attentions else (hidden_states,)


def qwen3_5_layer(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replace Qwen3_5DecoderLayer.forward: as Llama's, with full attention or linear attention."""
    residual = hidden_states
    hidden_states = normalise(self, "input_layernorm", hidden_states)
    if self.block_type == "linear_attention":
        hidden_states = self.linear_attn(
            hidden_states=hidden_states, cache_params=past_key_values, attention_mask=attention_mask, **kwargs
        )
    elif self.block_type == "full_attention":
        run, attention = run_of(self, "self_attn")
        hidden_states, _ = run(
            attention,
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    return _feed_forward(self, residual, hidden_states)


def gemma_layer(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replace Gemma2DecoderLayer.forward and Gemma3's, which also normalise the output of attention and MLP."""
    residual = hidden_states
    hidden_states = normalise(self, "input_layernorm", hidden_states)
    run, attention = run_of(self, "self_attn")
    hidden_states, _ = run(
        attention,
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        **kwargs,
    )
    hidden_states = normalise(self, "post_attention_layernorm", hidden_states)
    hidden_states, residual = add_then_norm(residual, hidden_states, self, "pre_feedforward_layernorm")
    run, mlp = run_of(self, "mlp")
    hidden_states = run(mlp, hidden_states)
    hidden_states = normalise(self, "post_feedforward_layernorm", hidden_states)
    return add_before_next(self, residual, hidden_states)


def _pre_norm(self: Any, hidden_states: Tensor, attention: dict[str, Any]) -> Tensor:
    residual = hidden_states
    hidden_states = normalise(self, "input_layernorm", hidden_states)
    run, module = run_of(self, "self_attn")
    hidden_states, _ = run(module, hidden_states=hidden_states, **attention)
    return _feed_forward(self, residual, hidden_states)


def _feed_forward(self: Any, residual: Tensor, hidden_states: Tensor) -> Tensor:
    hidden_states, residual = add_then_norm(residual, hidden_states, self, "post_attention_layernorm")
    run, mlp = run_of(self, "mlp")
    hidden_states = run(mlp, hidden_states)
    return add_before_next(self, residual, hidden_states)


def obstacles(layer: nn.Module) -> Iterator[str]:
    """Yield, for each addition of a patched layer that is not fused with the norm behind it, why it is not."""
    name = "pre_feedforward_layernorm" if hasattr(layer, "pre_feedforward_layernorm") else "post_attention_layernorm"
    norm = getattr(layer, name)
    reason = obstacle(norm) if is_bare(norm) else "it has a hook, or a forward of its own"
    if reason is not None:
        yield f"{name}: {reason}"
    following = vars(layer).get(FOLLOWING)
    reason = "no norm is known to follow" if following is None else following.obstacle()
    if reason is not None:
        yield reason


def follow(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Tell each of these layers which norm follows: ``input_layernorm`` of the next layer, or the model's ``norm``."""
    chosen = set(layers)
    for holder in model.modules():
        found = holder._modules.get("layers")
        if not isinstance(found, nn.ModuleList) or not chosen:
            continue
        names = list(found._modules)
        following = [Following(found, name, "input_layernorm") for name in names[1:]] + [Following(holder, "norm")]
        for layer, norm in zip(found, following, strict=False):
            if layer in chosen:
                vars(layer)[FOLLOWING] = norm
