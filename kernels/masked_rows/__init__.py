"""Masked rows in Triton, without synchronisation and without data-dependent shapes.

An index of the mask says which row is read and which is written; placeholder rows and invalid rows are never read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import aligned, alignment, kernel
from vlmfast.kernels.common.launch import (
    ASSERTING,
    MAX_EXTENT,
    ceil_div,
    config_for,
    device_unsupported,
    on_device,
    with_contiguous_rows,
)
from vlmfast.kernels.masked_rows.mask_ranks import index_of, index_total, order_of


@triton.jit
def _rows(
    index_ptr, positions, tokens, rows, batch_stride, token_stride, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Return the positions of a program, their entries in the index, and their offsets in a (B, T, D) tensor.

    A device-side assertion fails unless the index numbers exactly as many rows as there are.
    """
    if tl.program_id(0) == 0:
        total = index_total(tl.load(index_ptr + positions - 1))
        tl.device_assert(total == rows, "the mask must be true at as many positions as there are rows")
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rank = tl.load(index_ptr + row, mask=row < positions, other=-1)
    batch = row // tokens
    batch_stride, token_stride = aligned(batch_stride, ALIGNED), aligned(token_stride, ALIGNED)
    return row, rank, batch.to(tl.int64) * batch_stride + (row - batch * tokens).to(tl.int64) * token_stride


@kernel
def add_or_place_kernel(
    x_ptr,
    embeds_ptr,
    index_ptr,
    y_ptr,
    x_batch_stride,
    x_token_stride,
    embeds_row_stride,
    positions,
    tokens,
    hidden,
    embeds_rows,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy x, with the rows of ``embeds`` added to the masked rows or in their place."""
    row, rank, offset = _rows(
        index_ptr, positions, tokens, embeds_rows, x_batch_stride, x_token_stride, ALIGNED, BLOCK_ROWS
    )
    hidden, embeds_row_stride = aligned(hidden, ALIGNED), aligned(embeds_row_stride, ALIGNED)
    masked = rank >= 0
    x_ptr += offset
    embeds_ptr += rank.to(tl.int64) * embeds_row_stride
    y_ptr += row.to(tl.int64) * hidden
    x_read = row < positions if ADD else (row < positions) & (rank < 0)
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        x = tl.load(x_ptr + column, mask=x_read & inside, other=0.0)
        embeds = tl.load(embeds_ptr + column, mask=masked & (rank < embeds_rows) & inside, other=0.0)
        merged = embeds.to(tl.float32).to(x.dtype)
        if ADD:
            merged = (x.to(tl.float32) + merged.to(tl.float32)).to(x.dtype)
        tl.store(y_ptr + column, tl.where(masked, merged, x), mask=(row < positions) & inside)


@kernel
def split_kernel(
    x_ptr,
    index_ptr,
    taken_ptr,
    rest_ptr,
    x_batch_stride,
    x_token_stride,
    positions,
    tokens,
    hidden,
    rows,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy the masked rows of x, and the rest of x with zeros in their place."""
    row, rank, offset = _rows(index_ptr, positions, tokens, rows, x_batch_stride, x_token_stride, ALIGNED, BLOCK_ROWS)
    hidden = aligned(hidden, ALIGNED)
    masked = rank >= 0
    x_ptr += offset
    taken_ptr += rank.to(tl.int64) * hidden
    rest_ptr += row.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        x = tl.load(x_ptr + column, mask=((row < positions) if REST else masked) & inside, other=0.0)
        tl.store(taken_ptr + column, x, mask=masked & (rank < rows) & inside)
        if REST:
            tl.store(rest_ptr + column, tl.where(masked, 0.0, x), mask=(row < positions) & inside)


@kernel
def pack_kernel(
    tokens_ptr,
    invalid_ptr,
    order_ptr,
    packed_ptr,
    packed_invalid_ptr,
    batch_stride,
    token_stride,
    rows,
    tokens,
    keep,
    hidden,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy the tokens in ``order``, zeros where they are invalid."""
    hidden = aligned(hidden, ALIGNED)
    batch_stride, token_stride = aligned(batch_stride, ALIGNED), aligned(token_stride, ALIGNED)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    batch = (row // keep).to(tl.int64)
    position = tl.load(order_ptr + row, mask=row < rows, other=-1)
    exists = (position >= 0) & (position < tokens)
    tl.device_assert(exists | (row >= rows), "order must be within the tokens of a sequence")
    invalid = tl.load(invalid_ptr + batch * tokens + position, mask=exists, other=True)
    tl.store(packed_invalid_ptr + row, invalid, mask=row < rows)
    tokens_ptr += batch * batch_stride + position * token_stride
    packed_ptr += row.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        packed = tl.load(tokens_ptr + column, mask=(invalid == 0) & inside, other=0.0)
        tl.store(packed_ptr + column, packed, mask=(row < rows) & inside)


@kernel
def unpack_kernel(
    grad_packed_ptr,
    index_ptr,
    grad_ptr,
    batch_stride,
    token_stride,
    positions,
    tokens,
    keep,
    hidden,
    PAD_LEFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy the gradient of the slot that each valid token was packed into; zeros for tokens without a slot."""
    hidden = aligned(hidden, ALIGNED)
    batch_stride, token_stride = aligned(batch_stride, ALIGNED), aligned(token_stride, ALIGNED)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    batch = (row // tokens).to(tl.int64)
    slot = tl.load(index_ptr + row, mask=row < positions, other=-1)
    packed = (slot >= 0) & (slot < keep)
    if PAD_LEFT:
        total = index_total(tl.load(index_ptr + (batch + 1) * tokens - 1, mask=row < positions, other=0))
        slot += keep - tl.minimum(total, keep)
    grad_packed_ptr += batch * batch_stride + slot.to(tl.int64) * token_stride
    grad_ptr += row.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        grad = tl.load(grad_packed_ptr + column, mask=packed & inside, other=0.0)
        tl.store(grad_ptr + column, grad, mask=(row < positions) & inside)


# ---- launchers ----


def unsupported(x: Tensor, mask: Tensor, *_: Any) -> str | None:
    if mask.numel() > MAX_EXTENT:
        return f"the mask has {mask.numel()} positions, more than {MAX_EXTENT}"
    if x.shape[-1] > MAX_EXTENT:
        return f"a row has {x.shape[-1]} elements, more than {MAX_EXTENT}"
    return device_unsupported(x)


def row_index_unsupported(mask: Tensor) -> str | None:
    return unsupported(mask, mask)


def row_index(mask: Tensor) -> Tensor:
    return index_of(mask.reshape(1, -1), True).view(mask.shape)


def deepstack_add(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> Tensor:
    return _add_or_place(hidden_states, visual_pos_masks, visual_embeds, index, add=True)


def place_embeddings(inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None) -> Tensor:
    return _add_or_place(inputs_embeds, mask, image_embeds, index, add=False)


def _is_empty(mask: Tensor, rows: int) -> bool:
    """Return whether there are no positions, and so no program that could check the number of rows."""
    if mask.numel() == 0 and rows > 0:
        raise ValueError(f"the mask must be true at as many positions as there are rows, {rows}, got none")
    return mask.numel() == 0


def _add_or_place(x: Tensor, mask: Tensor, embeds: Tensor, index: Tensor | None, add: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if _is_empty(mask, embeds.shape[0]):
        return y
    index = row_index(mask) if index is None else index.contiguous()
    x, embeds = with_contiguous_rows(x), with_contiguous_rows(embeds)
    hidden, config = x.shape[2], config_for(x.shape[2])
    with on_device(x):
        add_or_place_kernel[(ceil_div(mask.numel(), config.BLOCK_ROWS),)](
            *(x, embeds, index, y),
            *(*x.stride()[:2], embeds.stride(0), mask.numel(), mask.shape[1], hidden, embeds.shape[0]),
            ADD=add,
            ALIGNED=alignment(hidden, *x.stride()[:2], embeds.stride(0)),
            **vars(config),
            **ASSERTING,
        )
    return y


def split_rows(
    x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True
) -> tuple[Tensor, Tensor]:
    hidden = x.shape[2]
    taken = x.new_empty(rows, hidden)
    remaining = x.new_empty(x.shape if rest else 0)
    if _is_empty(mask, rows):
        return taken, remaining
    index = row_index(mask) if index is None else index.contiguous()
    x, config = with_contiguous_rows(x), config_for(hidden)
    with on_device(x):
        split_kernel[(ceil_div(mask.numel(), config.BLOCK_ROWS),)](
            *(x, index, taken, remaining),
            *(*x.stride()[:2], mask.numel(), mask.shape[1], hidden, rows),
            REST=rest,
            ALIGNED=alignment(hidden, *x.stride()[:2]),
            **vars(config),
            **ASSERTING,
        )
    return taken, remaining


def compact_tokens(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    batch, token_count, hidden = tokens.shape
    packed = tokens.new_empty(batch, keep, hidden)
    packed_invalid = tokens.new_empty(batch, keep, dtype=torch.bool)
    invalid = invalid.contiguous()
    order = order_of(invalid, keep, pad_left) if order is None else order.clone(memory_format=torch.contiguous_format)
    if order.numel() == 0:
        return packed, packed_invalid, order
    tokens, config = with_contiguous_rows(tokens), config_for(hidden)
    with on_device(tokens):
        pack_kernel[(ceil_div(batch * keep, config.BLOCK_ROWS),)](
            *(tokens, invalid, order, packed, packed_invalid),
            *(*tokens.stride()[:2], batch * keep, token_count, keep, hidden),
            ALIGNED=alignment(hidden, *tokens.stride()[:2]),
            **vars(config),
            **ASSERTING,
        )
    return packed, packed_invalid, order


def compact_tokens_backward(grad_tokens: Tensor, invalid: Tensor, pad_left: bool = False) -> Tensor:
    keep, hidden = grad_tokens.shape[1:]
    grad = grad_tokens.new_empty((*invalid.shape, hidden))
    if grad.numel() == 0:
        return grad
    index = index_of(invalid, False)
    grad_tokens, config = with_contiguous_rows(grad_tokens), config_for(hidden)
    with on_device(grad):
        unpack_kernel[(ceil_div(invalid.numel(), config.BLOCK_ROWS),)](
            *(grad_tokens, index, grad),
            *(*grad_tokens.stride()[:2], invalid.numel(), invalid.shape[1], keep, hidden),
            PAD_LEFT=pad_left,
            ALIGNED=alignment(hidden, *grad_tokens.stride()[:2]),
            **vars(config),
        )
    return grad
