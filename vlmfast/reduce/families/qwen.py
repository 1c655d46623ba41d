"""The reducer of Qwen-VL, whose towers have no CLS token and merge squares of patches into visual tokens.

A visual token's score is the attention that its patches get in the last block from the patches of their image. The
tower runs once, with its configured attention; hooks record the block's projections and angles. With flash attention,
upstream (VisionZip for Qwen2.5-VL) mixes all images of a call; here images are kept apart.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.functions import accepting
from vlmfast.host import on_host, to_device
from vlmfast.ops.attention_scores import received_attention
from vlmfast.reduce.groups import by_group, groups
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.tokens import Grid, VisualTokens
from vlmfast.reduce.towers import recorded, sizes_in


def reduce(
    base: nn.Module, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Encode the images and reduce their visual tokens; images of one size are computed together.

    A merged token takes the place of its target. The raster order stays.

    Raises:
        RuntimeError: as `recorded`. ValueError: if the budget of the method does not fit an image.
    """
    return _reduce(base, "image", "pixel_values", inputs, method, texts)


def reduce_videos(
    base: nn.Module, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Encode the videos and reduce their visual tokens, as `reduce` does for images.

    The tower attends within each frame, which is two frames of the camera.
    """
    return _reduce(base, "video", "pixel_values_videos", inputs, method, texts)


def _reduce(
    base: Any, kind: str, name: str, inputs: Mapping[str, Any], method: Method, texts: Texts
) -> list[ReducedImage]:
    pixels, grid_thw = inputs[name], sizes_in(inputs, f"{kind}_grid_thw", name)
    side: int = base.visual.spatial_merge_size
    grids: list[Grid] = [(t, h // side, w // side) for t, h, w in on_host(grid_thw).tolist()]
    encode = base.get_video_features if kind == "video" else base.get_image_features
    levels, attention = _encode(base.visual, functools.partial(encode, pixels, grid_thw, return_dict=True), grids)
    return reduce_encoded(levels, attention, pixels, grids, [method] * len(grids), kind, texts)


def reduce_encoded(
    levels: Sequence[Tensor],
    attention: BlockAttention,
    pixels: Tensor,
    grids: Sequence[Grid],
    methods: Sequence[Method],
    kind: str = "image",
    texts: Texts = unknown_texts,
) -> list[ReducedImage]:
    """Reduce the visual tokens of encoded images or videos, N in all; those of one method by one choice.

    Args:
        levels: the features, then those of DeepStack, each (N, D), in raster order.
        attention: the attention of the last block.
        pixels: (patches, C), the input of the tower.
        grids: the grid of each image.
        methods: the method of each image.
        kind: "image" or "video".
        texts: a function that returns the text about each image.

    Raises:
        ValueError: if the budget of the method does not fit an image.
    """
    counts = [math.prod(grid) for grid in grids]
    # images of each size read it in turn
    scores, metric = functools.cache(attention.scores), functools.cache(attention.metric)
    text = texts(counts)

    def stack(rows: Tensor, members: list[int]) -> Tensor:
        """(N, ...) of all images -> (B, N, ...) of images of one size."""
        parts = torch.split(rows, counts)
        return torch.stack([parts[number] for number in members])

    def tokens_of(grid: Grid, members: list[int]) -> VisualTokens:
        hidden = stack(levels[0], members)
        return VisualTokens(
            hidden=hidden,
            grid=grid,
            scores=lambda: stack(scores(), members),
            metric=lambda: stack(metric(), members),
            features=hidden.detach,
            pixels=lambda: stack(pixels.reshape(-1, attention.group, pixels.shape[1]), members),
            text=lambda: text()[members],
            crops=grid[0] if kind == "video" else 1,
        )

    def reduce_by(method: Method, own: list[int]) -> list[ReducedImage]:
        """Reduce the images of a method: one choice, and then those of each size together."""
        sizes = [(grid, [own[member] for member in members]) for grid, members in groups([grids[n] for n in own])]
        tokens = [tokens_of(grid, members) for grid, members in sizes]
        found: dict[int, ReducedImage] = {}
        for selection, (grid, members), shown in zip(
            method.select_each(tokens, kind == "video"), sizes, tokens, strict=True
        ):
            rows = [selection.apply(level) for level in (shown.hidden, *(stack(x, members) for x in levels[1:]))]
            found |= zip(members, cut(selection, rows, grid, shown.count, kind=kind), strict=True)
        return [found[number] for number in own]

    return by_group(methods, reduce_by)


@dataclass(frozen=True)
class BlockAttention:
    """Queries and keys of a tower's last block for all images; scores are computed when first needed."""

    query: Tensor  # (T, H, head_dim), rotated
    key: Tensor  # (T, H, head_dim), rotated
    bounds: Tensor  # (S + 1,) int32, where images, or frames of a video, begin and end
    group: int  # how many consecutive patches become one visual token
    scale: float  # of the logits
    order: Tensor | None  # (N,) the raster positions of the visual tokens, where the block has them in another order

    def scores(self) -> Tensor:
        """(N,) float32, of a float64 model float64: the attention that the patches of each visual token get."""
        by_head = self.query.transpose(0, 1), self.key.transpose(0, 1)
        return self._raster(accepting(received_attention, self.key)(*by_head, self.bounds, self.group, self.scale))

    def metric(self) -> Tensor:
        """(N, head_dim) float32, of a float64 model float64: the mean key of each visual token."""
        wide = torch.promote_types(self.key.dtype, torch.float32)
        return self._raster(self.key.reshape(-1, self.group, *self.key.shape[1:]).mean((1, 2), dtype=wide))

    def _raster(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else torch.empty_like(rows).index_copy(0, self.order, rows)


def _encode(tower: Any, encode: Callable[[], Any], grids: Sequence[Grid]) -> tuple[list[Tensor], BlockAttention]:
    """Run the tower, which ``encode`` does.

    Returns:
        Over the N visual tokens of all images in raster order: the features and DeepStack's, each (N, D); and the
        attention of the last block.
    """
    attention = tower.blocks[-1].attn
    with recorded(attention=attention, qkv=attention.qkv) as calls:
        output = encode()
    given, projected = calls["attention"].kwargs, calls["qkv"].output.detach()
    device = projected.device
    found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    # a tensor for each image, except for the levels of DeepStack up to transformers 5.17
    levels = [(level if isinstance(level, Tensor) else torch.cat(level)).to(device) for level in found]

    query, key, _ = projected.reshape(projected.shape[0], 3, attention.num_heads, -1).unbind(1)  # (T, H, D)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision  # type: ignore[attr-defined]
    query, key = rotate(query, key, *(part.to(device) for part in given["position_embeddings"]))
    bounds = given["cu_seqlens"].to(device, torch.int32)  # of images, or frames of a video
    order = raster_order(tower, grids, device)
    return levels, BlockAttention(query, key, bounds, tower.spatial_merge_size**2, attention.scaling, order)


def raster_order(tower: Any, grids: Sequence[Grid], device: torch.device) -> Tensor | None:
    """Return `window_order` on the device if the tower has windows, otherwise None."""
    if not hasattr(tower, "window_size"):
        return None
    window = tower.window_size // tower.spatial_merge_size // tower.patch_size
    return to_device(device, window_order(grids, window))[0]


def window_order(grids: Sequence[Grid], window: int) -> Tensor:
    """Return the raster positions of visual tokens in the order of Qwen2.5-VL's encoder, (N,) int64 over all images.

    The order goes window by window in each frame. A window is ``window`` tokens wide and high, or fewer at the right
    and lower edges.
    """
    parts = [torch.empty(0, dtype=torch.int64)]
    start = 0
    for frames, rows, columns in grids:
        windows = torch.arange(rows)[:, None] // window * columns + torch.arange(columns) // window
        order = windows.flatten().argsort(stable=True)
        parts += [order + start + frame * rows * columns for frame in range(frames)]
        start += frames * rows * columns
    return torch.cat(parts)
