"""Rows chosen by a mask: added to (DeepStack), replaced (image embeddings) and packed (token compaction).

Upstream finds the rows with ``nonzero`` and boolean indexing, which synchronise with the device and give data-dependent
shapes. Here a prefix sum of the mask numbers the masked rows, and all shapes are known in advance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return (B, T, D) with the row of its number at each masked position, and any row or zeros elsewhere."""
    if isinstance(rows.shape[0], int) and rows.shape[0] == 0:  # under a tracer it may be symbolic (Idefics3)
        return rows.new_zeros(*index.shape, rows.shape[1])
    return rows[index.clamp(0, rows.shape[0] - 1)]


def _indexed(mask: Tensor, rows: int, index: Tensor | None) -> Tensor:
    checks.expect(mask.sum() == rows, f"the mask must be true at as many positions as there are rows, {rows}")
    return row_index.op.reference(mask) if index is None else index


# ---- what a call must look like ----


def _check_row_index(mask: Tensor) -> None:
    checks.tensor("mask", mask, "BT", (torch.bool,))
    if mask.numel() >= 2**31:
        raise ValueError(f"mask must have fewer than 2**31 positions, got {mask.numel()}")


def check_rows(name: str, x: Tensor, mask_name: str, mask: Tensor, index: Tensor | None) -> None:
    """Raise unless ``x`` is (B, T, D), ``mask`` (B, T) and ``index``, if any, that of the mask."""
    checks.tensor(name, x, "BTD")
    checks.tensor(mask_name, mask, "BT", (torch.bool,))
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{mask_name} must have shape {tuple(x.shape[:2])}, the first sizes of {name}, got {tuple(mask.shape)}"
        )
    checks.same_device(mask_name, mask, name, x)
    if index is not None:
        checks.tensor("index", index, dtypes=(torch.int32,))
        checks.same_shape("index", index, mask_name, mask)
        checks.same_device("index", index, name, x)
        if checks.on_host(mask) and checks.on_host(index) and not torch.equal(index >= 0, mask):
            raise ValueError(f"index must be what row_index gives for {mask_name}, got that of another mask")


def _check_count(mask_name: str, mask: Tensor, rows_name: str, rows: int) -> None:
    if checks.on_host(mask) and (found := int(mask.count_nonzero())) != rows:
        raise ValueError(f"{mask_name} must be true at as many positions as {rows_name}, {rows}, got {found}")


def _check_embeds(name: str, x: Tensor, mask_name: str, mask: Tensor, embeds_name: str, embeds: Tensor) -> None:
    checks.tensor(embeds_name, embeds)
    if embeds.dim() != 2 or embeds.shape[1] != x.shape[2]:
        raise ValueError(
            f"{embeds_name} must have shape (V, {x.shape[2]}), the last size that of {name}, got {tuple(embeds.shape)}"
        )
    checks.same_device(embeds_name, embeds, name, x)
    _check_count(mask_name, mask, f"{embeds_name} has rows", embeds.shape[0])


def _check_deepstack_add(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> None:
    check_rows("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks, index)
    _check_embeds("hidden_states", hidden_states, "visual_pos_masks", visual_pos_masks, "visual_embeds", visual_embeds)


def _check_place_embeddings(
    inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None
) -> None:
    check_rows("inputs_embeds", inputs_embeds, "mask", mask, index)
    _check_embeds("inputs_embeds", inputs_embeds, "mask", mask, "image_embeds", image_embeds)


def _check_split_rows(x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True) -> None:
    check_rows("x", x, "mask", mask, index)
    _check_count("mask", mask, "rows says", rows)


def _check_compact_tokens(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> None:
    check_rows("tokens", tokens, "invalid", invalid, None)
    checks.within("keep", keep, invalid.shape[1], "the tokens of a sequence")
    if order is not None:
        checks.tensor("order", order, dtypes=(torch.int64,))
        if order.shape != (invalid.shape[0], keep):
            raise ValueError(f"order must have shape {(invalid.shape[0], keep)}, got {tuple(order.shape)}")
        checks.same_device("order", order, "tokens", tokens)


def _check_compact_tokens_backward(grad_tokens: Tensor, invalid: Tensor, pad_left: bool = False) -> None:
    checks.tensor("grad_tokens", grad_tokens)
    checks.tensor("invalid", invalid, "BT", (torch.bool,))
    checks.same_device("invalid", invalid, "grad_tokens", grad_tokens)
    shape = tuple(grad_tokens.shape)
    if len(shape) != 3 or shape[0] != invalid.shape[0] or shape[1] > invalid.shape[1]:
        raise ValueError(
            f"grad_tokens must have shape ({invalid.shape[0]}, keep, D) with keep <= {invalid.shape[1]}, got {shape}"
        )


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, embeds, index = inputs
    ctx.rows, ctx.dtype = embeds.shape[0], embeds.dtype
    ctx.save_for_backward(mask, index)


def _add_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    if not ctx.needs_input_grad[2]:
        return (grad_output,)
    mask, index = ctx.saved_tensors
    grad_embeds, _ = split_rows(grad_output, mask, ctx.rows, index, rest=False)
    return grad_output, None, grad_embeds.to(ctx.dtype)


def _place_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    mask, index = ctx.saved_tensors
    inputs_grad = ctx.needs_input_grad[0]
    if not ctx.needs_input_grad[2]:
        return (grad_output.masked_fill(mask[..., None], 0),)
    grad_embeds, grad_inputs = split_rows(grad_output, mask, ctx.rows, index, rest=inputs_grad)
    return grad_inputs if inputs_grad else None, None, grad_embeds.to(ctx.dtype)


def _compact_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, invalid, _, order, ctx.pad_left = inputs
    ctx.save_for_backward(invalid, order)


def _compact_backward(ctx: Any, grad_tokens: Tensor, *_: None) -> tuple[Tensor]:
    invalid, order = ctx.saved_tensors
    if order is None:
        return (compact_tokens_backward(grad_tokens, invalid, ctx.pad_left),)
    # A given order may be any, even with a token taken twice.
    hidden = grad_tokens.shape[2]
    kept = grad_tokens.masked_fill(invalid.gather(1, order)[..., None], 0)
    grad = grad_tokens.new_zeros(*invalid.shape, hidden)
    return (grad.scatter_add_(1, order[..., None].expand(-1, -1, hidden), kept),)


# ---- the definitions ----


@op(check=_check_row_index, exact=True)
def row_index(mask: Tensor) -> Tensor:
    """Assign numbers to the rows of a mask, once for all ops that use the same mask.

    A position where the mask is true gets its rank among these positions, in row-major order over the batch. Any other
    position gets the bitwise complement of the rank of the next true one, a negative number. The last entry thus
    determines the number of rows.

    Args:
        mask: (B, T) bool.

    Returns:
        (B, T) int32.

    Raises:
        TypeError: for a mask that is not bool. ValueError: for another shape, or 2**31 positions and more.

    Source:
        The order in which ``masked_scatter`` and boolean indexing take rows.
    """
    flat = mask.flatten().to(torch.int64)
    rank = (flat.cumsum(0) - flat).view(mask.shape)
    return torch.where(mask, rank, ~rank).int()


@op(check=_check_deepstack_add, gradients=(_setup_context, _add_backward), exact=True)
def deepstack_add(
    hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor, index: Tensor | None = None
) -> Tensor:
    """Add visual features to the rows of the hidden states that belong to visual tokens, out of place.

    The i-th row where the mask is true, in row-major order over the batch, gets the i-th row of ``visual_embeds``,
    rounded to the dtype of ``hidden_states`` before the addition.

    Args:
        hidden_states: (B, T, D) float32, float16 or bfloat16; any strides.
        visual_pos_masks: (B, T) bool, true at V positions.
        visual_embeds: (V, D) float32, float16 or bfloat16.
        index: what `row_index` gives for ``visual_pos_masks``, if it is at hand; it must belong to this very mask.

    Returns:
        (B, T, D) contiguous, of the dtype of ``hidden_states``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, or on a CPU a mask
            that is not true at V positions; on a GPU that trips a device-side assertion.

    Source:
        Qwen3VLTextModel._deepstack_process of transformers 5.23.
    """
    index = _indexed(visual_pos_masks, visual_embeds.shape[0], index)
    added = hidden_states + take_rows(visual_embeds.to(hidden_states.dtype), index)
    return torch.where(visual_pos_masks[..., None], added, hidden_states)


@op(check=_check_place_embeddings, gradients=(_setup_context, _place_backward), exact=True)
def place_embeddings(inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None) -> Tensor:
    """Put the image embeddings in the place of the placeholder tokens, out of place.

    The i-th row where the mask is true, in row-major order over the batch, becomes the i-th row of ``image_embeds``,
    rounded to the dtype of ``inputs_embeds``. The previous values there, NaNs included, are ignored.

    Args:
        inputs_embeds: (B, T, D) float32, float16 or bfloat16; any strides.
        mask: (B, T) bool, true at V positions.
        image_embeds: (V, D) float32, float16 or bfloat16.
        index: what `row_index` gives for ``mask``, if it is at hand; it must belong to this very mask.

    Returns:
        (B, T, D) contiguous, of the dtype of ``inputs_embeds``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, or on a CPU a mask
            that is not true at V positions; on a GPU that trips a device-side assertion.

    Source:
        ``inputs_embeds.masked_scatter(mask, image_embeds)`` in Qwen3VLModel.forward and others of transformers 5.23.
    """
    index = _indexed(mask, image_embeds.shape[0], index)
    return torch.where(mask[..., None], take_rows(image_embeds.to(inputs_embeds.dtype), index), inputs_embeds)


@op(check=_check_split_rows, exact=True)
def split_rows(
    x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True
) -> tuple[Tensor, Tensor]:
    """Take the masked rows out: the gradients of `deepstack_add` and `place_embeddings`.

    Args:
        x: (B, T, D) float32, float16 or bfloat16; any strides.
        mask: (B, T) bool, true at ``rows`` positions.
        rows: V, the number of masked rows.
        index: what `row_index` gives for ``mask``, if it is at hand.
        rest: False if the second output is not needed.

    Returns:
        ``(taken, rest)``: (V, D), the masked rows in row-major order, and (B, T, D), ``x`` with zeros in their place,
        or (0,) if ``rest`` is False. Both are contiguous.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, or on a CPU a mask
            that is not true at ``rows`` positions; on a GPU that trips a device-side assertion.

    Source:
        The derivative of ``masked_scatter``.
    """
    index = _indexed(mask, rows, index)
    spare = torch.where(mask, index, rows)  # other rows go to one spare row at the end
    taken = x.new_zeros(rows + 1, x.shape[-1]).index_put((spare,), x)[:rows]
    return taken, x.masked_fill(mask[..., None], 0) if rest else x.new_empty(0)


@op(check=_check_compact_tokens, gradients=(_compact_setup_context, _compact_backward), exact=True)
def compact_tokens(
    tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, pad_left: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the valid tokens of each sequence together, in their order, and cut or pad each sequence to ``keep``.

    If a sequence has more valid tokens than ``keep``, the last ones are dropped. If it has fewer, invalid ones follow
    (``pad_left``: precede), in their order, and their rows are zeros.

    Args:
        tokens: (B, T, D) float32, float16 or bfloat16; any strides.
        invalid: (B, T) bool, true where a token is masked out.
        keep: the length of the result, 0 to T.
        order: the third result of a call with the same ``invalid``, ``keep`` and ``pad_left``, if it is at hand.
        pad_left: put invalid tokens before the valid ones.

    Returns:
        ``(tokens, invalid, order)``: (B, keep, D) and (B, keep) bool, both contiguous, and (B, keep) int64, the
        position of each token in the input.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, or a ``keep`` that
            is not within 0 to T.

    Source:
        FM.forward_mask_encoder of apple/ml-4m, whose float32 key is exact only below 1e6 tokens.
    """
    if order is not None:
        order = order.clone()
    else:
        order = torch.argsort(invalid.byte(), dim=1, stable=True)[:, :keep]
        if pad_left:
            order = order.gather(1, torch.argsort(invalid.gather(1, order).byte(), dim=1, descending=True, stable=True))
    kept_invalid = invalid.gather(1, order)
    kept = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
    return kept.masked_fill(kept_invalid[..., None], 0), kept_invalid, order


@op(check=_check_compact_tokens_backward, exact=True)
def compact_tokens_backward(grad_tokens: Tensor, invalid: Tensor, pad_left: bool = False) -> Tensor:
    """Move the gradient of each packed token back to the token's position: the gradient of `compact_tokens`.

    Args:
        grad_tokens: (B, keep, D) float32, float16 or bfloat16; any strides.
        invalid: (B, T) bool, as in the forward; T >= keep.
        pad_left: as in the forward.

    Returns:
        (B, T, D) contiguous; zero for tokens that were dropped or invalid.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit.

    Source:
        The derivative of `compact_tokens`.
    """
    keep, hidden = grad_tokens.shape[1:]
    if keep == 0:
        return grad_tokens.new_zeros(*invalid.shape, hidden)
    valid = ~invalid
    position = valid.cumsum(1) - 1
    kept = valid & (position < keep)
    if pad_left:
        position = position + keep - kept.sum(1, keepdim=True)
    position = position.clamp(0, keep - 1)[..., None].expand(-1, -1, hidden)
    return grad_tokens.gather(1, position).masked_fill(~kept[..., None], 0)
