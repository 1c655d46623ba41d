"""Attention of vision towers within the segments that ``cu_seqlens`` delimits: windows, images or frames.

Upstream reads the segments' lengths from the device three times in every block, and attends to one segment after the
other. Here they are read once for each ``cu_seqlens``, and segments of equal length form a batch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmfast.checks import DTYPES
from vlmfast.host import is_traced, keep, kept, to_device
from vlmfast.linear import linear
from vlmfast.modules import project
from vlmfast.ops.rope import qk_norm_rope
from vlmfast.ops.rope.definition import MAX_HEAD_DIM
from vlmfast.patches.upstream import names_of

# Most attention logits that eager attention holds at a time, over all heads; upstream holds those of one segment.
EAGER_SCORES = 2**25
# Arguments that transformers' SDPA attention takes and torch's varlen attention does not.
NOT_VARLEN = {"softcap", "position_bias", "cache"}


@dataclass(frozen=True)
class Segments:
    """The segments of a sequence of tokens, grouped by length.

    Attributes:
        ends: the values of ``cu_seqlens``: the first token, then the end of each segment.
        groups: (length, number of segments) of each group that is attended to as one batch.
        order: (T,) int64, the tokens sorted by group; None where they are in that order already.
        back: (T,) int64, the inverse permutation of ``order``; None where ``order`` is.
    """

    ends: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> Segments:
        """Read the segments from ``cu_seqlens``; the host waits for its device."""
        return cls.between(cu_seqlens.tolist(), cu_seqlens.device)  # type: ignore[no-untyped-call]

    @classmethod
    def between(cls, ends: list[int], device: torch.device) -> Segments:
        """Group the segments between these ends by length; the permutations are put on ``device``."""
        lengths = [end - start for start, end in pairwise(ends)]
        groups = tuple(Counter(lengths).items())
        runs = sum(length != after for length, after in pairwise((*lengths, None)))
        if runs == len(groups) or min(lengths) < 0:
            return cls(tuple(ends), groups)
        ranks = {length: rank for rank, (length, _) in enumerate(groups)}
        with torch.inference_mode(False):  # the tensors are cached and may later be used in training
            rank = torch.tensor([ranks[length] for length in lengths], device="cpu")
            order = rank.repeat_interleave(torch.tensor(lengths, device="cpu")).argsort(stable=True)
            return cls(tuple(ends), groups, *to_device(device, order, order.argsort()))

    def cover(self, tokens: int) -> bool:
        """Tell whether the segments hold exactly ``tokens`` tokens and none is empty; if not, upstream runs."""
        return bool(self.groups) and self.ends[-1] - self.ends[0] == tokens and min(self.groups)[0] > 0


def segments_of(cu_seqlens: Tensor) -> Segments:
    """Return the segments of ``cu_seqlens``, cached on it: all blocks of a forward receive the same tensor."""
    return kept(cu_seqlens, "_segments", Segments.of)


def tell_segments(cu_seqlens: Tensor, on_host: Tensor) -> None:
    """Cache the segments on ``cu_seqlens``, computed from a copy of it that is on the host already."""
    keep(cu_seqlens, "_segments", Segments.between(on_host.tolist(), cu_seqlens.device))  # type: ignore[no-untyped-call]


def attend(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replace VisionAttention.forward of Qwen2-VL and its copies."""
    output = _attended(self, hidden_states, cu_seqlens, position_embeddings, kwargs)
    if output is not None:
        return output
    upstream: Tensor = self.original_class.forward(
        self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, max_seqlen=max_seqlen, **kwargs
    )
    return upstream


def attend_457(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    rotary_pos_emb: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replace VisionAttention.forward of transformers 4.57, which does not use ``rotary_pos_emb``."""
    output = _attended(self, hidden_states, cu_seqlens, position_embeddings, kwargs)
    if output is not None:
        return output
    upstream: Tensor = self.original_class.forward(
        self, hidden_states, cu_seqlens, rotary_pos_emb, position_embeddings, **kwargs
    )
    return upstream


def _attended(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Attend by upstream's functions and modules; None where upstream's own body has to run."""
    names = names_of(self.original_class, "forward")
    attention = _attention(self, names)
    if attention is None or position_embeddings is None:
        return None
    segments = segments_of(cu_seqlens)
    tokens = hidden_states.shape[0]
    if not segments.cover(tokens):
        return None
    qkv, (cos, sin) = project(self, "qkv", hidden_states, linear), position_embeddings
    varlen = _varlen(self, qkv, cu_seqlens, segments, attention, kwargs)
    if varlen is None and segments.order is not None:
        qkv, cos, sin = (tensor.index_select(0, segments.order) for tensor in (qkv, cos, sin))
    query, key, value = qkv.reshape(tokens, 3, self.num_heads, -1).unbind(1)
    query, key = _turned(names["apply_rotary_pos_emb_vision"], query, key, cos, sin)
    if varlen is not None:
        longest = max(segments.groups)[0]
        output = varlen(query, key, value, cu_seqlens, cu_seqlens, longest, longest).reshape(tokens, -1)
    else:
        output = _in_groups(self, attention, (query, key, value), segments, kwargs).reshape(tokens, -1)
        if segments.back is not None:
            output = output.index_select(0, segments.back)
    return project(self, "proj", output.contiguous(), linear)


def _turned(upstream: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Apply RoPE to queries and keys in float32: in one launch where the op takes them, else by upstream's function."""
    if query.dtype not in DTYPES or query.shape[-1] > MAX_HEAD_DIM or cos.requires_grad or sin.requires_grad:
        return upstream(query, key, cos, sin)
    return qk_norm_rope(query, key, None, None, cos.float(), sin.float())


def _attention(self: Any, names: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the function that upstream calls for each segment; None unless it is transformers' own SDPA or eager."""
    if is_traced() or (self.training and self.attention_dropout):
        return None
    implementation = self.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return None
    function = names["ALL_ATTENTION_FUNCTIONS"].get(implementation, names["eager_attention_forward"])
    own = names["eager_attention_forward"]
    if implementation == "sdpa":
        own = sys.modules["transformers.integrations.sdpa_attention"].sdpa_attention_forward
    return own if function is own else None  # type: ignore[no-any-return]


def _in_groups(
    self: Any,
    attention: Callable[..., Any],
    heads: tuple[Tensor, Tensor, Tensor],
    segments: Segments,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend to the segments of each length as a batch; the tokens must be in the order of the groups."""
    outputs, start = [], 0
    for length, number in segments.groups:
        at_once = number
        if self.config._attn_implementation == "eager":
            at_once = min(number, max(1, EAGER_SCORES // (heads[0].shape[1] * length**2)))
        for first in range(0, number, at_once):
            count = min(at_once, number - first)
            query, key, value = (
                tensor[start : start + count * length].view(count, length, *tensor.shape[1:]).transpose(1, 2)
                for tensor in heads
            )
            outputs.append(
                attention(
                    self,
                    query,
                    key,
                    value,
                    attention_mask=None,
                    scaling=self.scaling,
                    dropout=0.0,
                    is_causal=False,
                    **kwargs,
                )[0].flatten(0, 1)
            )
            start += count * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen(
    self: Any,
    qkv: Tensor,
    cu_seqlens: Tensor,
    segments: Segments,
    attention: Callable[..., Any],
    kwargs: dict[str, Any],
) -> Callable[..., Tensor] | None:
    """Return torch's varlen attention, which runs flash attention on segments of any lengths, if it takes this call.

    None where it does not, and where all segments have one length: SDPA computes these as a batch, with the kernels
    that upstream uses.
    """
    if len(segments.groups) == 1 or not qkv.is_cuda or qkv.dtype not in (torch.float16, torch.bfloat16):
        return None
    head_dim = qkv.shape[-1] // (3 * self.num_heads)
    # The flash kernels take these head dimensions, and torch's function has only the default scale.
    if head_dim > 256 or head_dim % 8 or self.scaling != head_dim**-0.5 or NOT_VARLEN & kwargs.keys():
        return None
    if self.config._attn_implementation != "sdpa" or torch.are_deterministic_algorithms_enabled():
        return None
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    if not flash or torch.version.hip or torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return None
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device or segments.ends[0] != 0:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[return-value]
