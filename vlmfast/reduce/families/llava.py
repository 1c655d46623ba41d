"""The images of LLaVA-1.5 and ViP-LLaVA: the tower sees an image as a whole, and each patch is a visual token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.towers import encode, vision_setting


def reduce(base: Any, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts) -> list[ReducedImage]:
    """Encode all images at once, reduce the input of the projector, and project what is left.

    Where the tower has a CLS token that the model does not use (``vision_feature_select_strategy="default"``), a method
    may keep it in front; where the model uses it, it stays.
    """
    config: Any = base.config
    # up to transformers 5.17 ViP-LLaVA, which takes several layers, has vision_feature_layers
    name = "vision_feature_layer" if hasattr(config, "vision_feature_layer") else "vision_feature_layers"
    layer = vision_setting(base, inputs, name)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    uses_first = inputs.get("vision_feature_select_strategy", strategy) != "default"
    resized = {name: inputs[name] for name in ("interpolate_pos_encoding",) if name in inputs}
    encoded = encode(base.vision_tower, inputs["pixel_values"], layer, **resized)
    if not encoded.has_cls and not uses_first:
        raise ValueError(
            'vision_feature_select_strategy must be "full", got "default", which leaves out a CLS token: the vision '
            "tower has none"
        )
    project = base.multi_modal_projector
    total = (encoded.hidden if uses_first else encoded.patches).shape[1]
    text = texts([total] * len(encoded.hidden))
    tokens = encoded.visual_tokens(lambda: project(encoded.patches), encoded.has_cls, total, text)
    selection = method.select(tokens)
    if uses_first and encoded.has_cls:
        selection = replace(selection, keep_cls=True)
    # these models count positions again, so only the number of columns matters
    rows = project(encoded.reduce(selection))
    return cut(selection, [rows], (1, encoded.side, encoded.side), total, in_raster_order=False)
