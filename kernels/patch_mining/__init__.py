"""Patch-info mining in Triton: one program per token, which reads its block of the map twice, without a copy."""

from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import MAX_EXTENT, device_unsupported, on_device, with_contiguous_rows
from vlmfast.kernels.patch_mining.mining import MAX_PIXELS, MiningConfig, mine_backward_kernel, mine_kernel


def mine_patches_unsupported(query: Tensor, feature_map: Tensor, scale: int, *_: Any) -> str | None:
    batch, tokens, channels = query.shape
    if scale * scale > MAX_PIXELS:
        return f"a block has {scale * scale} pixels, more than {MAX_PIXELS}"
    if max(batch * tokens, channels) > MAX_EXTENT:
        return f"there are {batch * tokens} tokens of {channels} channels, more than {MAX_EXTENT}"
    return device_unsupported(query)


def mine_patches_backward_unsupported(_: Tensor, *args: Any) -> str | None:
    return mine_patches_unsupported(*args)


def _operands(
    query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None, norm_eps: float
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Return the tensors, sizes and constants that both kernels take."""
    _, tokens, channels = query.shape
    feature_map, blocks = with_contiguous_rows(feature_map), None if blocks is None else with_contiguous_rows(blocks)
    strides = feature_map.stride()[:3]
    numbers = *strides, 0 if blocks is None else blocks.stride(0), tokens, channels, feature_map.shape[3], norm_eps
    config = vars(MiningConfig.config_for(scale, channels))
    return (feature_map, blocks), numbers, {**config, "ALIGNED": alignment(*strides), "SCALE": scale}


def mine_patches(
    query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None = None, norm_eps: float = 1e-5
) -> Tensor:
    batch, tokens, channels = query.shape
    mined = query.new_empty(batch, tokens, channels)
    if mined.numel():
        query = with_contiguous_rows(query)
        tensors, numbers, constants = _operands(query, feature_map, scale, blocks, norm_eps)
        with on_device(query):
            mine_kernel[(batch * tokens,)](query, *tensors, mined, *query.stride()[:2], *numbers, **constants)
    return mined


def mine_patches_backward(
    grad_output: Tensor,
    query: Tensor,
    feature_map: Tensor,
    scale: int,
    blocks: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = query.shape
    _, _, height, width = feature_map.shape
    whole = tokens * scale * scale == height * width
    grad_query = query.new_empty(batch, tokens, channels)
    grad_map = (torch.empty if whole else torch.zeros)(feature_map.shape, dtype=query.dtype, device=query.device)
    if grad_query.numel():
        grad_output, query = with_contiguous_rows(grad_output), with_contiguous_rows(query)
        tensors, numbers, constants = _operands(query, feature_map, scale, blocks, norm_eps)
        with on_device(query):
            mine_backward_kernel[(batch * tokens,)](
                *(grad_output, query, *tensors, grad_query, grad_map),
                *(*grad_output.stride()[:2], *query.stride()[:2], *numbers, height),
                GRAD_ALIGNED=alignment(width),
                **constants,
            )
    return grad_query, grad_map
