"""Token reduction of InternVL, each of whose visual tokens consists of 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmfast.reduce.groups import by_group
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage, cut
from vlmfast.reduce.text import Texts, unknown_texts
from vlmfast.reduce.tokens import VisualTokens
from vlmfast.reduce.towers import EncodedImages, encode, vision_setting


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
    return reduce_tiles(model, encoded, states[:, 1:], pixels, [method] * len(pixels), texts)


def reduce_tiles(
    model: Any,
    encoded: EncodedImages,
    patches: Tensor,
    pixels: Tensor,
    methods: Sequence[Method],
    texts: Texts = unknown_texts,
) -> list[ReducedImage]:
    """Reduce encoded tiles, those of one method together.

    Args:
        model: Hugging Face's model or vLLM's, whose pixel shuffle and projector have the same names.
        encoded: the tiles, encoded.
        patches: (B, patches, C), the output of the tower.
        pixels: its input.
        methods: the method of each tile.
        texts: a function that returns the text about each tile.
    """
    side, ratio = encoded.side, model.config.downsample_ratio

    def shuffle(patches: Tensor) -> Tensor:
        """(B, patches, M) -> (B, tokens, patches of a token * M)."""
        maps = patches.reshape(len(patches), side, side, -1)
        tokens: Tensor = model.pixel_shuffle(maps, scale_factor=ratio)
        return tokens.flatten(1, 2)

    project = model.multi_modal_projector
    hidden = shuffle(patches)
    grid = (1, *(round(side * ratio),) * 2)
    tiles = VisualTokens(
        hidden=hidden,
        grid=grid,
        scores=lambda: shuffle(encoded.scores().unsqueeze(2)).mean(2),
        metric=lambda: shuffle(encoded.metric()).view(*hidden.shape[:2], -1, encoded.key.shape[3]).mean(2),
        features=lambda: project(hidden).detach(),
        pixels=lambda: pixels,
        text=texts([hidden.shape[1]] * len(hidden)),
    )

    def reduce_alike(method: Method, members: list[int]) -> list[ReducedImage]:
        tokens = tiles.take(members, tiles.count)
        selection = method.select(tokens)
        # all placeholders are alike: the ones of the kept tokens stay, so that tokens keep their places
        return cut(selection, [project(selection.apply(tokens.hidden))], grid, tokens.count)

    return by_group(methods, reduce_alike)
