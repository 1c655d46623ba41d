"""Pack LLaVA-NeXT's crops without waiting for the device.

Upstream's own function packs row numbers on the host; the device then gathers the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.host import is_traced, on_host, to_device

NEWLINE = -1


def encode_tiles(
    self: Any,
    pixel_values: Tensor,
    image_sizes: Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """Replace LlavaNextModel.get_image_features: run upstream's method with the image sizes on the host."""
    return self.original_class.get_image_features(
        self,
        pixel_values,
        _sizes(image_sizes),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        **kwargs,
    )


def pack_tiles(
    self: Any,
    image_features: Sequence[Tensor],
    image_sizes: Tensor,
    vision_feature_select_strategy: str,
    image_newline: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Replace LlavaNextModel.pack_image_features, which cuts off padding and puts a newline behind each row."""
    upstream = self.original_class.pack_image_features
    side = self.config.vision_config.image_size // self.config.vision_config.patch_size
    device = image_features[0].device
    if asks_the_host(device) or any(features.shape[1:2] != (side**2,) for features in image_features):
        return upstream(self, image_features, image_sizes, vision_feature_select_strategy, image_newline)  # type: ignore[no-any-return]
    newline = None if image_newline is None else torch.tensor([float(NEWLINE)], dtype=torch.float64, device="cpu")
    numbers = [
        torch.arange(len(features) * side**2, dtype=torch.float64, device="cpu").view(len(features), -1, 1)
        for features in image_features
    ]
    packed, lengths = upstream(self, numbers, _sizes(image_sizes), vision_feature_select_strategy, newline)
    *rows, lengths = to_device(device, *(number.flatten().long() for number in packed), lengths)
    return [_take(features, row, image_newline) for features, row in zip(image_features, rows, strict=True)], lengths


def asks_the_host(device: torch.device) -> bool:
    """Tell whether upstream's own code should run: under a tracer, and on a CPU, where it waits for nothing."""
    return is_traced() or device.type == "cpu"


def _sizes(image_sizes: Any) -> Any:
    """Copy the image sizes to the host, unless they are not a tensor or are being traced."""
    return on_host(image_sizes) if isinstance(image_sizes, Tensor) and not is_traced() else image_sizes


def _take(features: Tensor, rows: Tensor, newline: Tensor | None) -> Tensor:
    """Gather rows from the features of all crops, and put the newline embedding where a row is `NEWLINE`."""
    found = features.flatten(0, 1).index_select(0, rows.clamp(min=0))
    return found if newline is None else torch.where(rows[:, None] == NEWLINE, newline.to(found), found)
