"""Patch-info mining (Mini-Gemini): each token attends to the pixels of its own block of a finer feature map.

Upstream projects each pixel to a key and a value. One query reads them, so neither need be formed::

    q . (W_k n + b_k) = (W_k^T q) . n + constant, which drops out of the softmax
    sum p (W_v n + b_v) = W_v (sum p n) + b_v

What is left is attention over the map itself, without a copy. For 576 tokens, each with 64 pixels of 2880 channels,
that is 0.4 GFLOP, plus 6.8 GFLOP for the two weights, instead of 435 GFLOP, and there is no permuted copy of 212 MB.
`vlmfast.compat.mgm` does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op

# ---- what a call must look like ----


def _check(
    query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None = None, norm_eps: float = 1e-5
) -> None:
    checks.tensor("query", query, "BTC")
    checks.tensor("feature_map", feature_map, ("B", "C", "height", "width"))
    if query.dtype != feature_map.dtype:
        raise TypeError(f"feature_map must have the dtype of query, {query.dtype}, got {feature_map.dtype}")
    checks.same_device("feature_map", feature_map, "query", query)
    if not isinstance(scale, (int, torch.SymInt)) or isinstance(scale, bool) or scale < 1:
        raise ValueError(f"scale must be an int of at least 1, got {scale!r}")
    batch, channels, height, width = feature_map.shape
    if channels < 1 or height % scale or width % scale:
        raise ValueError(
            f"feature_map must have shape (B, C, height, width) with a channel and sides divisible by scale, {scale}, "
            f"got {tuple(feature_map.shape)}"
        )
    tokens = (height // scale) * (width // scale)
    if query.shape[0] != batch or query.shape[2] != channels or (blocks is None and query.shape[1] != tokens):
        expected = tokens if blocks is None else "T"
        raise ValueError(
            f"query must have shape ({batch}, {expected}, {channels}) for a map of {tuple(feature_map.shape)} and a "
            f"scale of {scale}, got {tuple(query.shape)}"
        )
    if blocks is not None:
        _check_blocks(blocks, query, tokens)
    checks.epsilon("norm_eps", norm_eps)


def _check_blocks(blocks: Tensor, query: Tensor, tokens: int) -> None:
    checks.tensor("blocks", blocks, dtypes=(torch.int64,))
    if blocks.shape != query.shape[:2]:
        raise ValueError(f"blocks must have shape {tuple(query.shape[:2])}, got {tuple(blocks.shape)}")
    checks.same_device("blocks", blocks, "query", query)
    if checks.on_host(blocks) and blocks.numel():
        rises = bool((blocks[:, 1:] > blocks[:, :-1]).all())
        if not rises or int(blocks[:, 0].min()) < 0 or int(blocks[:, -1].max()) >= tokens:
            raise ValueError(f"blocks must be ascending within 0 and {tokens - 1} in each row")


def _check_backward(
    grad_output: Tensor,
    query: Tensor,
    feature_map: Tensor,
    scale: int,
    blocks: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> None:
    _check(query, feature_map, scale, blocks, norm_eps)
    checks.tensor("grad_output", grad_output)
    checks.same_shape("grad_output", grad_output, "query", query)
    checks.same_device("grad_output", grad_output, "query", query)
    if grad_output.dtype != query.dtype:
        raise TypeError(f"grad_output must have the dtype of query, {query.dtype}, got {grad_output.dtype}")


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, feature_map, ctx.scale, blocks, ctx.norm_eps = inputs
    ctx.save_for_backward(query, feature_map, blocks)  # recomputing the softmax of 64 pixels is cheaper


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    query, feature_map, blocks = ctx.saved_tensors
    grads = mine_patches_backward(grad_output, query, feature_map, ctx.scale, blocks, ctx.norm_eps)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))


# ---- the definitions ----


def block_pixels(feature_map: Tensor, scale: int, blocks: Tensor | None) -> Tensor:
    """Gather the pixels of each token's block, in raster order: (B, T, scale ** 2, C)."""
    batch, channels, height, width = feature_map.shape
    grid = feature_map.reshape(batch, channels, height // scale, scale, width // scale, scale)
    pixels = grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
    return pixels if blocks is None else pixels.take_along_dim(blocks[..., None, None], 1)


def _as_map(pixels: Tensor, like: Tensor, scale: int, blocks: Tensor | None) -> Tensor:
    """Put pixels back where `block_pixels` took them from, zeros elsewhere."""
    batch, channels, height, width = like.shape
    rows, columns = height // scale, width // scale
    if blocks is not None:
        everywhere = pixels.new_zeros(batch, rows * columns, *pixels.shape[2:])
        pixels = everywhere.scatter(1, blocks[..., None, None].expand(pixels.shape), pixels)
    grid = pixels.view(batch, rows, columns, scale, scale, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(like.shape)


def _logits(query: Tensor, normed: Tensor) -> Tensor:
    return torch.matmul(normed, query[..., None]).squeeze(-1)


@op(check=_check, gradients=(_setup_context, _backward))
def mine_patches(
    query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None = None, norm_eps: float = 1e-5
) -> Tensor:
    """Attend from each token to the pixels of its own block of a map, normalised over their channels.

    With ``n_j`` the pixels of the token's ``scale`` x ``scale`` block after a LayerNorm without weights::

        sum_j softmax_j(nan_to_num(query . n_j)) n_j

    All of it is in float32, rounded once. Projections of keys and values are not part of the op: that of the keys must
    be applied to ``query``, that of the values to the result.

    Args:
        query: (B, T, C) float32, float16 or bfloat16; any strides.
        feature_map: (B, C, height, width) of the dtype of ``query``, both sides divisible by ``scale``; any strides.
        scale: the pixels along each side of a block.
        blocks: (B, T) int64, ascending, the number of each token's block in raster order; None if every block has a
            token.
        norm_eps: added to the variance; finite, not negative.

    Returns:
        (B, T, C) contiguous, of the dtype of ``query``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a scale that do not fit, or on a
            CPU ``blocks`` that are not ascending within the map; on a GPU that is not checked.

    Source:
        The attention of MGMMetaForCausalLM.unified_resampler of dvlab-research/MGM, mgm/model/mgm_arch.py, without its
        projections.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    pixels = block_pixels(feature_map, scale, blocks).to(wide)
    normed = F.layer_norm(pixels, pixels.shape[-1:], eps=norm_eps)
    weights = _logits(query.to(wide), normed).nan_to_num().softmax(-1)
    return torch.matmul(weights[..., None, :], normed).squeeze(-2).to(query.dtype)


@op(check=_check_backward)
def mine_patches_backward(
    grad_output: Tensor,
    query: Tensor,
    feature_map: Tensor,
    scale: int,
    blocks: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `mine_patches`, in float32 and rounded once.

    With ``p`` the softmax of the logits ``l_j = query . n_j``, ``r_j`` the inverse deviation of pixel j and
    ``g = grad_output``::

        d_j = p_j * (g . n_j - sum_i p_i * (g . n_i)), 0 where l_j is not finite
        grad_query = sum_j d_j * n_j
        e_j = p_j * g + d_j * query
        grad_pixel_j = r_j * (e_j - mean(e_j) - n_j * mean(e_j * n_j))

    Args:
        grad_output: (B, T, C) the gradient of the output, of the dtype of ``query``.
        query: (B, T, C) as in the forward.
        feature_map: (B, C, height, width) as in the forward.
        scale: as in the forward.
        blocks: as in the forward; pixels of other blocks have a gradient of 0.
        norm_eps: as in the forward.

    Returns:
        ``(grad_query, grad_map)``, contiguous, of the shapes and the dtype of ``query`` and ``feature_map``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a scale that do not fit.

    Source:
        The derivative of the expressions above.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grad, own = grad_output.to(wide), query.to(wide)
    pixels = block_pixels(feature_map, scale, blocks).to(wide)
    centred = pixels - pixels.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # corrects the rounding error of a mean far from zero
    inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm_eps)
    normed = centred * inverse
    logits = _logits(own, normed)
    weights = logits.nan_to_num().softmax(-1)
    reached = _logits(grad, normed)
    slopes = weights * (reached - (weights * reached).sum(-1, keepdim=True))
    slopes = torch.where(logits.isfinite(), slopes, 0.0)
    grad_query = torch.matmul(slopes[..., None, :], normed).squeeze(-2)
    grad_normed = weights[..., None] * grad[..., None, :] + slopes[..., None] * own[..., None, :]
    along = (grad_normed * normed).mean(-1, keepdim=True)
    grad_pixels = inverse * (grad_normed - grad_normed.mean(-1, keepdim=True) - normed * along)
    grad_map = _as_map(grad_pixels, feature_map, scale, blocks)
    return grad_query.to(query.dtype), grad_map.to(feature_map.dtype)
