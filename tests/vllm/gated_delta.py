"""The linear attention of Qwen3.5 in float32 for vLLM on CPUs, whose own kernel takes bfloat16 alone.

The recurrence is transformers', the states are where vLLM keeps them, so that its caches and chunks are tested.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name


def install() -> None:
    """Take the place of vLLM's function, before its first layer makes an operator of it."""
    gdn_attention.cpu_gdn_attention_core = core


def core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: LayerNameType) -> None:
    """Do what `cpu_gdn_attention_core` does, sequence by sequence."""
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if not isinstance(context.attn_metadata, dict):
        return
    batch = context.attn_metadata[layer.prefix]
    conv, states = layer.kv_cache
    if is_conv_state_dim_first():
        conv = conv.transpose(1, 2)
    sequences = batch.num_decodes + batch.num_prefills
    known = [True] * sequences if batch.has_initial_state is None else batch.has_initial_state[:sequences].tolist()
    known[: batch.num_decodes] = [True] * batch.num_decodes
    for number in range(sequences):
        own = slice(*batch.non_spec_query_start_loc[number : number + 2].tolist())
        slot = int(batch.non_spec_state_indices_tensor[number])
        past, state = conv[slot], states[slot].mT
        if not known[number]:
            past, state = torch.zeros_like(past), torch.zeros_like(state)
        rows = torch.cat([past, mixed_qkv[own]])
        shifted = F.conv1d(rows.T[None], layer.conv1d.weight, layer.conv1d.bias, groups=rows.shape[1])
        query, key, value = layer.rearrange_mixed_qkv(F.silu(shifted)[0].T)
        each = value.shape[2] // query.shape[2]
        out, state = torch_recurrent_gated_delta_rule(
            query.repeat_interleave(each, 2),
            key.repeat_interleave(each, 2),
            value,
            g=(-layer.A_log.float().exp() * F.softplus(a[own].float() + layer.dt_bias))[None],
            beta=b[own].sigmoid()[None],
            initial_state=state[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[own] = out[0]
        conv[slot] = rows[-conv.shape[1] :]
        states[slot] = state[0].mT
