"""The videos of LLaVA-NeXT-Video and LLaVA-OneVision, which pool the patches of each frame, mostly 2 x 2 to a token.

A token's score and metric are pooled from its patches: in LLaVA-OneVision like the features, in LLaVA-NeXT-Video always
as means, even if it pools features by the maximum or a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.families.llava_next import encode_crops
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.tokens import VisualTokens
from vlmfast.reduce.towers import EncodedImages

Pool = Callable[[Tensor], Tensor]  # (frames, patches, M) -> (frames, tokens, M)


def reduce_next(
    model: Any, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Reduce the videos of LLaVA-NeXT-Video, between the pooling and the projector."""

    def mean(patches: Tensor) -> Tensor:
        side = math.isqrt(patches.shape[1])
        maps = patches.mT.unflatten(2, (side, side))  # type: ignore[no-untyped-call]
        return nn.functional.avg_pool2d(maps, model.config.spatial_pool_stride).flatten(2).mT

    encoded = _encode(model, inputs)
    hidden = model.vision_resampler(encoded.patches)
    pixels = inputs["pixel_values_videos"]
    return _reduce(pixels, method, texts, encoded, hidden, mean, model.multi_modal_projector)


def reduce_onevision(
    model: Any, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Reduce the videos of LLaVA-OneVision, which pools the projector's output. The newline at their end stays."""
    return reduce_frames(model, _encode(model, inputs), inputs["pixel_values_videos"], method, texts)


def reduce_frames(
    model: Any, encoded: EncodedImages, pixels: Tensor, method: Method, texts: Texts = unknown_texts
) -> list[ReducedImage]:
    """Reduce encoded videos of LLaVA-OneVision.

    Args:
        model: Hugging Face's model or vLLM's, whose pooling, projector and newline have the same names.
        encoded: the frames of all videos, encoded.
        pixels: (videos, frames, C, H, W), the input of the tower.
        method: the method.
        texts: a function that returns the text of videos.
    """
    hidden = model.apply_pooling(model.multi_modal_projector(encoded.patches))
    with_newline: Texts = lambda totals: texts([total + 1 for total in totals])  # noqa: E731
    videos = _reduce(pixels, method, with_newline, encoded, hidden, model.apply_pooling, nn.Identity())
    return [
        replace(
            video,
            features=torch.cat([video.features, model.image_newline.to(video.features)[None]]),
            columns=torch.cat([video.columns, video.columns.new_tensor([video.total])]),
            total=video.total + 1,
        )
        for video in videos
    ]


def _encode(model: Any, inputs: Mapping[str, Any]) -> EncodedImages:
    """Run the tower on the frames of all videos, one after the other."""
    pixels: Tensor = inputs["pixel_values_videos"]
    config = model.config.vision_config
    frames = {**inputs, "pixel_values": pixels.flatten(0, 1)}
    return encode_crops(model, frames, [len(frames["pixel_values"])], config.image_size // config.patch_size)


def _reduce(
    pixels: Tensor,
    method: Method,
    texts: Texts,
    encoded: EncodedImages,
    hidden: Tensor,
    pool: Pool,
    project: Any,
) -> list[ReducedImage]:
    """Reduce videos, which all have the same number of frames.

    Args:
        pixels: (videos, frames, C, H, W), the input of the tower.
        method: the method.
        texts: a function that returns the text of videos.
        encoded: the frames, encoded.
        hidden: (frames, tokens, C), the pooled states.
        pool: pools scores and metric.
        project: computes the features from the rows that are left.
    """
    videos, frames = pixels.shape[:2]
    side = math.isqrt(hidden.shape[1])

    def whole(rows: Tensor) -> Tensor:
        """(B * T, n, M) -> (B, T * n, M)."""
        return rows.reshape(videos, -1, rows.shape[2])

    tokens = VisualTokens(
        hidden=whole(hidden),
        grid=(frames, side, side),
        scores=lambda: whole(pool(encoded.scores().unsqueeze(2))).squeeze(2),
        metric=lambda: whole(pool(encoded.metric())),
        features=lambda: project(whole(hidden)).detach(),
        pixels=lambda: pixels,
        text=texts([frames * hidden.shape[1]] * videos),
        crops=frames,
    )
    selection = method.select_videos(tokens)
    rows = project(selection.apply(tokens.hidden))
    return cut(selection, [rows], (frames, side, side), tokens.count, kind="video")
