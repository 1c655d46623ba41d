"""Moves the padding between image and text to one side of each sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.ops.masked_rows import compact_tokens
from vlmfast.ops.masked_rows.definition import check_rows

IGNORED = -100  # the label that cross entropy leaves out


class Repacked(NamedTuple):
    """What `repack` returns; ``position_ids`` and ``labels`` are None where they were not given."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    labels: Tensor | None


def repack(
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    side: str = "right",
    *,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    keep: int | None = None,
) -> Repacked:
    """Move all padding of each sequence to one side; valid tokens keep their order, position ids and labels.

    A causal model gives the valid tokens the same outputs as before if ``position_ids`` are carried along. Without them
    it counts the positions anew, without gaps.

    Args:
        inputs_embeds: (B, T, D) float32, float16 or bfloat16; any strides.
        attention_mask: (B, T) bool, or integers that are 0 or 1: true where a token is valid.
        side: where the padding goes, "right" (for training) or "left" (for generation).
        position_ids: (B, T), or (3, B, T) or (4, B, T) for M-RoPE, of any dtype.
        labels: (B, T) integers; each moves with its token.
        keep: the length of the result, 0 to T; T by default. No sequence may have more valid tokens.

    Returns:
        A `Repacked` of the dtypes given, with ``keep`` in the place of T. In the padding, embeddings and position ids
        are 0 and labels -100. Differentiable in ``inputs_embeds``.

    Raises:
        TypeError: for an argument of another type. ValueError: for shapes or devices that do not fit, an unknown side,
            and on a CPU for an attention mask with another value than 0 and 1, or a sequence with more than ``keep``
            valid tokens; on a GPU these two trip a device-side assertion, without waiting for the device.

    Source:
        Padding between the image and the text of a prompt, as LLaVA-style models make it when they put image embeddings
        in front of padded text.
    """
    checks.one_of("side", side, ("right", "left"))
    valid = _valid(inputs_embeds, attention_mask)
    length = valid.shape[1] if keep is None else keep
    tokens, invalid, order = compact_tokens(inputs_embeds, ~valid, length, None, side == "left")
    if length < valid.shape[1]:
        _require_room(valid.sum(1), length)
    return Repacked(
        tokens,
        (~invalid).to(attention_mask.dtype),
        None if position_ids is None else _repack_positions(position_ids, valid, order, invalid),
        None if labels is None else _repack_labels(labels, valid, order, invalid),
    )


def _valid(inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(attention_mask).__name__}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integers, got {attention_mask.dtype}")
    valid = attention_mask != 0
    check_rows("inputs_embeds", inputs_embeds, "attention_mask", valid, None)
    if attention_mask.dtype != torch.bool:
        binary = (attention_mask == valid).all()
        message = "attention_mask must hold 0 and 1 only"
        if not checks.on_host(attention_mask):
            checks.expect(binary, message)
        elif not binary:
            raise ValueError(f"{message}, got {attention_mask[attention_mask != valid][0].item()}")
    return valid


def _require_room(counts: Tensor, keep: int) -> None:
    if not checks.on_host(counts):
        checks.expect((counts <= keep).all(), "keep must be at least the number of valid tokens of each sequence")
    elif counts.numel() and (most := int(counts.max())) > keep:
        raise ValueError(f"keep must be at least {most}, the most valid tokens that a sequence has, got {keep}")


def _repack_positions(position_ids: Tensor, valid: Tensor, order: Tensor, invalid: Tensor) -> Tensor:
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids must be a torch.Tensor, got {type(position_ids).__name__}")
    if position_ids.shape[:-2] not in ((), (3,), (4,)) or position_ids.shape[-2:] != valid.shape:
        batch, tokens = valid.shape
        raise ValueError(
            f"position_ids must have shape ({batch}, {tokens}), or (3, {batch}, {tokens}) or (4, {batch}, {tokens}), "
            f"got {tuple(position_ids.shape)}"
        )
    checks.same_device("position_ids", position_ids, "attention_mask", valid)
    return position_ids.gather(-1, order.expand(*position_ids.shape[:-2], -1, -1)).masked_fill(invalid, 0)


def _repack_labels(labels: Tensor, valid: Tensor, order: Tensor, invalid: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16):
        raise TypeError(f"labels must be int64, int32 or int16, got {labels.dtype}")
    checks.same_shape("labels", labels, "attention_mask", valid)
    checks.same_device("labels", labels, "attention_mask", valid)
    return labels.gather(1, order).masked_fill(invalid, IGNORED)
