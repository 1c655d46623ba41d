"""Pixel shuffle, alone, with a LayerNorm and before a Linear."""

from vlmfast.ops.pixel_shuffle.connector import pixel_shuffle_linear
from vlmfast.ops.pixel_shuffle.definition import pixel_shuffle
from vlmfast.ops.pixel_shuffle.definition import pixel_shuffle_norm as pixel_shuffle_norm
from vlmfast.ops.pixel_shuffle.definition import pixel_shuffle_norm_backward as pixel_shuffle_norm_backward
from vlmfast.ops.pixel_shuffle.definition import pixel_unshuffle as pixel_unshuffle

__all__ = ["pixel_shuffle", "pixel_shuffle_linear"]
