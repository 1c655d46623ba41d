"""Token reduction of InternVL, each of whose visual tokens consists of 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.tokens import VisualTokens
from vlmfast.reduce.towers import encode, vision_setting


def reduce(model: Any, inputs: Mapping[str, Any], method: Method, texts: Texts = unknown_texts) -> list[ReducedImage]:
    """Encode the tiles and reduce each with its own budget.

    Each tile counts as an image: their order is that of the prompt, and the model is not told which tiles make up an
    image. The frames of a video are tiles as well.

    A token's score and metric are means over its patches: of the attention of the CLS token to them, and of their keys.
    Tokens are merged after the pixel shuffle, which joins their patches, and before the projector. The CLS token is not
    among them, so the whole budget goes to patches.
    """
    layer = vision_setting(model, inputs, "vision_feature_layer")
    pixels: Tensor = inputs["pixel_values"]
    encoded = encode(model.vision_tower, pixels.to(model.dtype), layer)
    strategy = vision_setting(model, inputs, "vision_feature_select_strategy")
    if not encoded.has_cls or strategy != "default":
        raise ValueError(
            "token reduction of InternVL needs a tower with a CLS token, cut off by vision_feature_select_strategy "
            f"'default', got {strategy!r}"
        )
    states = encoded.output.last_hidden_state if layer == -1 else encoded.hidden  # the last one may be normalised
    side, ratio = encoded.side, model.config.downsample_ratio

    def shuffle(patches: Tensor) -> Tensor:
        """(B, patches, M) -> (B, tokens, patches of a token * M)."""
        maps = patches.reshape(len(patches), side, side, -1)
        tokens: Tensor = model.pixel_shuffle(maps, scale_factor=ratio)
        return tokens.flatten(1, 2)

    project = model.multi_modal_projector
    hidden = shuffle(states[:, 1:])
    grid = (1, *(round(side * ratio),) * 2)
    tokens = VisualTokens(
        hidden=hidden,
        grid=grid,
        scores=lambda: shuffle(encoded.scores().unsqueeze(2)).mean(2),
        metric=lambda: shuffle(encoded.metric()).view(*hidden.shape[:2], -1, encoded.key.shape[3]).mean(2),
        features=lambda: project(hidden).detach(),
        pixels=lambda: pixels,
        text=texts([hidden.shape[1]] * len(hidden)),
    )
    selection = method.select(tokens)
    # all placeholders are alike: the ones of the kept tokens stay, so that tokens keep their places
    return cut(selection, [project(selection.apply(hidden))], grid, tokens.count)
