"""Where patches and tokens are, for kernels/pixel_shuffle.py: arithmetic, the same for every way through the map."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl


def layout(grid: Sequence[int], scale: int, order: str, input_scale: float) -> dict[str, Any]:
    """The arguments that say how a map of patches is shuffled, under the names that the kernels give them."""
    return {
        "height": grid[0] // scale,
        "width": grid[1] // scale,
        "scale": float(input_scale),
        "SCALED": input_scale != 1.0,
        "BY_COLUMN": order == "column",
    }


@triton.jit
def locate(patch, height, width, SCALE_Y: tl.constexpr, SCALE_X: tl.constexpr, BY_COLUMN: tl.constexpr):
    """The image, the token, the place in the token and the position in the map of patches numbered token by token.

    ``height`` and ``width`` count tokens, each of SCALE_Y x SCALE_X patches.
    """
    place = patch % (SCALE_Y * SCALE_X)
    token = patch // (SCALE_Y * SCALE_X)
    image = token // (height * width)
    token = token % (height * width)
    y = token % height if BY_COLUMN else token // width
    x = token // height if BY_COLUMN else token % width
    position = (y * SCALE_Y + place // SCALE_X) * (width * SCALE_X) + x * SCALE_X + place % SCALE_X
    return image, token, place, position


@triton.jit
def offset_of(image, index, image_stride, stride):
    """Where each patch or token of a (B, T, C) tensor begins."""
    return image.to(tl.int64) * image_stride + index.to(tl.int64) * stride


@triton.jit
def load_scaled(ptr, mask, scale, SCALED: tl.constexpr):
    """What is there, times ``scale`` and rounded to its dtype, as a product with a Python number is; in float32."""
    value = tl.load(ptr, mask=mask, other=0.0)
    return (value.to(tl.float32) * scale).to(value.dtype).to(tl.float32) if SCALED else value.to(tl.float32)
