"""Fewer visual tokens in the prompt: this changes what a model answers, so it is always asked for by name."""

from vlmfast.reduce.drawing import overlay
from vlmfast.reduce.images import ReducedImage
from vlmfast.reduce.methods import EvenTokens, Method, RandomTokens, Selection, VisionZip, VisualTokens

__all__ = ["EvenTokens", "Method", "RandomTokens", "ReducedImage", "Selection", "VisionZip", "VisualTokens", "overlay"]
