"""Look up the attention function of a model, and do what transformers' ``sdpa`` does for one token per prompt.

Both take the host as long as the attention of a token itself: transformers asks its configuration through three layers
of properties, and its function asks the environment and many conditions that cannot hold here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlmfast.patches.upstream import function_source
from vlmfast.releases import newer_transformers

# Digest of `sdpa_attention_forward` -> the least number of queries per key for which it says ``enable_gqa``. All do the
# same for one token without a mask, on a CPU or CUDA, with heads of at most 256 elements.
_KNOWN = {
    "b05b45fa208aec36": 1,  # transformers 4.57
    "363980e34ada69c9": 2,  # 5.17
    "894796735d9d62b8": 2,  # 5.23
}
_WIDEST = 256
# The further arguments that some of them read. All ignore others.
_READ = frozenset(("cache", "head_mask", "is_causal", "output_attentions", "position_bias", "softcap"))
_INTERNAL = "_attn_implementation_internal"


def attend_alone(
    module: Any,
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    arguments: Mapping[str, Any],
) -> Tensor | None:
    """Return the output (B, 1, H * D) of an attention function for one token per prompt that sees all keys.

    Args:
        module: the attention module.
        function: its attention function.
        query: (B, H, 1, D).
        key: (B, KV, T, D).
        value: likewise.
        dropout: the probability.
        arguments: further arguments of the function.

    Returns:
        The output; None where it takes a call of the function.
    """
    known, least = _sdpa()
    shape = query.shape
    if function is not known or shape[3] > _WIDEST or not _READ.isdisjoint(arguments):
        return None
    if not (query.is_cpu or query.is_cuda):
        return None
    grouped = {"enable_gqa": True} if getattr(module, "num_key_value_groups", 0) >= least else {}
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=dropout, scale=module.scaling, is_causal=False, **grouped
    )
    return output.reshape(shape[0], 1, -1)


@functools.cache
def _sdpa() -> tuple[Any, int]:
    """Return transformers' function, and from how many queries per key it says ``enable_gqa``; None if not known."""
    names = vars(importlib.import_module("transformers.integrations.sdpa_attention"))
    # On these devices, and on CPU tensors beside them, the function groups otherwise.
    if any(names.get(f"_is_torch_{device}_available") for device in ("mps", "npu", "xpu")):
        return None, 0
    function = names["sdpa_attention_forward"]
    least = _KNOWN.get(function_source(function).digest)
    return (None, 0) if least is None else (function, least)


def implementation_of(config: Any) -> Any:
    """Return ``config._attn_implementation``, from where the known releases of transformers store it."""
    cls: Any = type(config)
    if _is_stored(cls):
        stored = object.__getattribute__(config, "__dict__")
        if _INTERNAL in stored and "_heterogeneity_spec" not in stored:
            return stored[_INTERNAL]
    return config._attn_implementation


@functools.cache
def _is_stored(cls: type) -> bool:
    """Tell whether the property of this configuration returns what is stored, and nothing else."""
    getter = getattr(getattr(cls, "_attn_implementation", None), "fget", None)
    names = getattr(getattr(getter, "__code__", None), "co_names", ())
    return names == (_INTERNAL,) and newer_transformers() is None
