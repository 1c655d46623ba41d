"""The other arguments of a layer, beside hidden states, for the columns that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.columns import Columns, without_gaps


@dataclass(frozen=True)
class At:
    """The position and the setting of a call of the model.

    Attributes:
        past: the number of columns in the cache before the call, in layers before the first cut.
        tokens: the number of tokens of the call.
        width: the number of columns of a cache of fixed size, or None.
        implementation: the model's ``attn_implementation``.
    """

    past: int
    tokens: int
    width: int | None
    implementation: str


def rewritten(given: Mapping[str, Any], now: Columns | None, keys: Columns, at: At) -> dict[str, Any]:
    """Return the arguments of a layer that have to change.

    Args:
        given: its arguments by name, for all columns.
        now: the columns of this call that are left, or None for all.
        keys: those of the cache and of this call that are left; where text follows a prompt, those of the prompt.
        at: the call.
    """
    changed: dict[str, Any] = {}
    if now is not None:
        angles = (part.expand(len(now.index), -1, -1) for part in given["position_embeddings"])
        changed["position_embeddings"] = tuple(take_rows(part, now.index) for part in angles)
        positions = given.get("position_ids")
        if isinstance(positions, Tensor):
            # the angles are computed already; flash attention finds the beginnings of packed samples by gaps in these
            rows = positions.expand(*positions.shape[:-2], len(now.index), -1)
            own = now.to(rows.device)
            changed["position_ids"] = without_gaps(rows, own) if rows.dim() == 2 else own.take(rows, 0)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor):
        changed["attention_mask"] = _mask(mask, now, keys, at.width)
    elif keys.padded:
        changed["attention_mask"] = _made(now, keys, at)
    return changed


def valid_columns(mask: object) -> Tensor | None:
    """(B, N) bool: the columns that the last token may see, from a mask of any kind; None for all.

    Raises:
        ValueError: for a mask of another shape.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):  # one mask per kind of layer, as `generate` makes them for a static cache
        return valid_columns(mask.get("full_attention"))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        got = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be (B, L) or (B, H, L, L) where visual tokens are cut between layers, got {got}"
        )
    if mask.dim() == 2:
        return mask.bool()
    row = mask[:, 0, -1]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def take_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """(B, T, D) -> (B, n, D): the rows of these columns."""
    index = index.to(hidden.device)  # layers may be on several devices
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _mask(mask: Tensor, now: Columns | None, keys: Columns, width: int | None) -> Tensor:
    """Select the rows of queries and the columns of keys that are left, and those that follow the prompt."""
    batch, keys = len(keys.index), keys.to(mask.device)
    now = None if now is None else now.to(mask.device)
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
    if mask.dim() == 2:
        return torch.cat([keys.take(mask[:, : keys.total], 0), mask[:, keys.total :]], 1)
    mask = mask.expand(batch, -1, -1, -1)
    if now is not None:
        mask = mask.gather(2, now.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    index = keys.index[:, None, None].expand(-1, *mask.shape[1:3], -1)
    kept = mask[..., : keys.total].gather(3, index).masked_fill(~keys.valid[:, None, None], hidden)
    found = torch.cat([kept, mask[..., keys.total :]], 3)
    if width is not None:
        found = nn.functional.pad(found, (0, width - found.shape[3]), value=hidden)
    return found


def _made(now: Columns | None, keys: Columns, at: At) -> Tensor:
    """Make a mask where the model needs none, because no sample has padding: samples that were cut may have some.

    Eager attention always has one.
    """
    batch, device, total = len(keys.index), keys.index.device, at.past + at.tokens
    after = torch.arange(keys.total, total, device=device).expand(batch, -1)
    index = torch.cat([keys.index, after], 1)
    valid = torch.cat([keys.valid, torch.ones_like(after, dtype=torch.bool)], 1)
    if "flash" in at.implementation:  # or a kernel of the hub, such as kernels-community/flash-attn2
        return valid.long()
    rows = torch.arange(at.past, total, device=device).expand(batch, -1)
    if now is not None:
        rows = torch.where(
            now.valid, at.past + now.index, total
        )  # padding sees all columns, because a row must see at least one
    return (index[:, None, None] <= rows[:, None, :, None]) & valid[:, None, None]
