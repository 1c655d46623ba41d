"""Fewer visual tokens in the prompt: this changes what a model answers, so it is always asked for by name."""

from typing import TYPE_CHECKING, Any

from vlmfast.reduce.drawing import overlay
from vlmfast.reduce.methods import CLASSES, LayerMethod, Method, PruningMethod, VideoMethod
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.tokens import Selection, VisualTokens

globals().update(CLASSES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # the methods, which are found by name


__all__ = [
    "LayerMethod",
    "Method",
    "PruningMethod",
    "ReducedImage",
    "Selection",
    "VideoMethod",
    "VisualTokens",
    "overlay",
    *CLASSES,
]
