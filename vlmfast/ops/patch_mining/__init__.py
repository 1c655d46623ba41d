"""Attention of each token over the pixels of its own block of a finer map, without keys and values."""

from vlmfast.ops.patch_mining.definition import mine_patches
from vlmfast.ops.patch_mining.definition import mine_patches_backward as mine_patches_backward

__all__ = ["mine_patches"]
