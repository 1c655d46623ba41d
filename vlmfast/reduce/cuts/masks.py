"""What a layer is given beside hidden states, made to fit the columns that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.columns import Columns, without_gaps


@dataclass(frozen=True)
class At:
    """Where a call of the model stands.

    Attributes:
        past: the columns that the cache held before, as layers below the first cut count them.
        tokens: those of the call.
        width: the columns of a cache of a fixed size, or None.
        implementation: the model's attention.
    """

    past: int
    tokens: int
    width: int | None
    implementation: str


def rewritten(given: Mapping[str, Any], now: Columns | None, keys: Columns, at: At) -> dict[str, Any]:
    """Return the arguments of a layer that have to change.

    Args:
        given: its arguments by name, for all columns.
        now: the columns of this call that are left, None for all of them.
        keys: those of the cache and of this call that are left; where text follows a prompt, those of the prompt.
        at: where the call stands.
    """
    changed: dict[str, Any] = {}
    if now is not None:
        angles = (part.expand(len(now.index), -1, -1) for part in given["position_embeddings"])
        changed["position_embeddings"] = tuple(take_rows(part, now.index) for part in angles)
        positions = given.get("position_ids")
        if isinstance(positions, Tensor):
            # angles are made already: this tells flash attention, by its gaps, where packed samples begin
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
    """(B, N) bool: the columns that the last token may see, told by a mask of any kind; None for all of them.

    Raises:
        ValueError: for a mask that does not tell.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):  # one for each kind of layers, as `generate` makes them for a static cache
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
    index = index.to(hidden.device)  # layers may be on several
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _mask(mask: Tensor, now: Columns | None, keys: Columns, width: int | None) -> Tensor:
    """Take the rows of queries and the columns of keys that are left; what follows the prompt follows them."""
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
    """Make the mask that the model did without, as no sample has padding: samples that were cut may have some.

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
        rows = torch.where(now.valid, at.past + now.index, total)  # padding sees all, as a row must see something
    return (index[:, None, None] <= rows[:, None, :, None]) & valid[:, None, None]
