"""The reducer of Qwen-VL, whose towers have no CLS token and merge squares of patches into visual tokens.

A visual token's score is the attention that its patches get in the last block from the patches of their image. The
tower runs once, its attention as configured: hooks keep what the block projects and how it rotates that. Upstream
(VisionZip for Qwen2.5-VL) mixes all images of a call where flash attention is on; here its segments are kept apart.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.ops.attention_scores import received_attention
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.tokens import Grid, VisualTokens
from vlmfast.reduce.towers import hooked


@dataclass(frozen=True)
class BlockAttention:
    """What the last block of a tower attends with, over the T patches of all images in the order of the encoder.

    Attributes:
        query: (T, H, D), rotated, without a gradient.
        key: (T, H, D), rotated, without a gradient.
        cu_seqlens: (S + 1,) int32, where each segment begins: an image, or a frame of a video.
        scale: the factor of its logits.
        group: how many consecutive patches become one visual token.
        order: (T / group,) int64, the raster position of each visual token in the order of the encoder; None where that
            is the raster's.
    """

    query: Tensor
    key: Tensor
    cu_seqlens: Tensor
    scale: float
    group: int
    order: Tensor | None

    @functools.cached_property
    def scores(self) -> Tensor:
        """(T / group,) float32, in raster order: the attention that the patches of each visual token get."""
        query, key = self.query.transpose(0, 1), self.key.transpose(0, 1)
        return self._raster(received_attention(query, key, self.cu_seqlens, self.group, self.scale))

    @functools.cached_property
    def metric(self) -> Tensor:
        """(T / group, D) float32, in raster order: the keys, averaged over the patches and the heads."""
        return self._raster(self.key.reshape(-1, self.group, *self.key.shape[1:]).mean((1, 2), dtype=torch.float32))

    def _raster(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else torch.empty_like(rows).index_copy(0, self.order, rows)


def reduce(base: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """Encode the images and reduce their visual tokens, those of images of one size at once.

    A merged token takes the place of its target. The order stays that of the raster.

    Args:
        base: the model that has ``visual`` and ``get_image_features``.
        inputs: ``pixel_values`` and ``image_grid_thw``, as the processor makes them.
        method: decides on the visual tokens of each image.

    Returns:
        The images in the order of ``image_grid_thw``.

    Raises:
        RuntimeError: if the tower passes the hooks by, as ``torch.compile`` makes it. ValueError: if the budget of the
            method does not fit an image.
    """
    side: int = base.visual.spatial_merge_size  # type: ignore[union-attr, assignment]
    grids: list[Grid] = [(t, h // side, w // side) for t, h, w in inputs["image_grid_thw"].tolist()]
    levels, attention = _encode(base, inputs, grids)
    counts = [math.prod(grid) for grid in grids]

    def reduce_size(grid: Grid) -> Iterable[tuple[int, ReducedImage]]:
        members = [number for number, other in enumerate(grids) if other == grid]

        def stack(rows: Tensor) -> Tensor:
            """(N, ...) over all images -> (B, N, ...) of those of this size."""
            parts = torch.split(rows, counts)
            return torch.stack([parts[number] for number in members])

        features = [stack(level) for level in levels]
        tokens = VisualTokens(
            hidden=features[0],
            grid=grid,
            scores=lambda: stack(attention.scores),
            metric=lambda: stack(attention.metric),
            features=features[0].detach,
        )
        selection = method.select(tokens)
        rows = [selection.apply(level) for level in features]
        return zip(members, cut(selection, rows, grid, tokens.count), strict=True)

    images = dict(pair for grid in dict.fromkeys(grids) for pair in reduce_size(grid))
    return [images[number] for number in range(len(grids))]


def _encode(base: Any, inputs: Mapping[str, Any], grids: Sequence[Grid]) -> tuple[list[Tensor], BlockAttention]:
    """Run the tower.

    Returns:
        The features and DeepStack's, (N, D) over all images in raster order, and what the last block attends with.
    """
    tower = base.visual
    attention = tower.blocks[-1].attn
    seen: dict[str, Any] = {}
    watched = [
        (attention, lambda kwargs, _: seen.update(kwargs)),
        (attention.qkv, lambda _, output: seen.update(qkv=output.detach())),
    ]
    with hooked(watched):
        output = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    if "qkv" not in seen:
        raise RuntimeError("the vision tower passed its hooks by: reduce tokens with a tower that is not compiled")

    projected: Tensor = seen["qkv"]
    found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    # a tensor for each image, but in DeepStack's levels up to transformers 5.17
    levels = [level if isinstance(level, Tensor) else torch.cat(level) for level in found]
    levels = [level.to(projected.device) for level in levels]

    query, key, _ = projected.reshape(projected.shape[0], 3, attention.num_heads, -1).unbind(1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision  # type: ignore[attr-defined]
    query, key = rotate(query, key, *(part.to(projected.device) for part in seen["position_embeddings"]))
    bounds = seen["cu_seqlens"].to(projected.device, torch.int32)
    side = tower.spatial_merge_size
    order = None
    if hasattr(tower, "window_size"):
        order = window_order(grids, tower.window_size // side // tower.patch_size).to(projected.device)
    return levels, BlockAttention(query, key, bounds, attention.scaling, side**2, order)


def window_order(grids: Sequence[Grid], window: int) -> Tensor:
    """Return the raster positions of visual tokens in the order of Qwen2.5-VL's encoder: window by window in a frame.

    Args:
        grids: of each image.
        window: how many visual tokens a window is wide and high; those at the right and lower edge may be smaller.

    Returns:
        (N,) int64, over all images.
    """
    parts = [torch.empty(0, dtype=torch.int64)]
    start = 0
    for frames, rows, columns in grids:
        windows = torch.arange(rows)[:, None] // window * columns + torch.arange(columns) // window
        order = windows.flatten().argsort(stable=True)
        parts += [order + start + frame * rows * columns for frame in range(frames)]
        start += frames * rows * columns
    return torch.cat(parts)
