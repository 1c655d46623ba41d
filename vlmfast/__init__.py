"""vlmfast: fused kernels for vision-language models, and drop-in patches for Hugging Face transformers."""

from vlmfast.deepstack_hooks import deepstack, deepstack_levels
from vlmfast.ops.masked_rows import compact_tokens, deepstack_add, place_embeddings, row_index
from vlmfast.ops.pixel_shuffle import pixel_shuffle, pixel_shuffle_linear
from vlmfast.ops.rms_norm import add_rms_norm, rms_norm
from vlmfast.patches import Patch, patch, unpatch
from vlmfast.registry import explain, use
from vlmfast.repacking import repack

__version__ = "0.1.0"
__all__ = [
    "Patch",
    "add_rms_norm",
    "compact_tokens",
    "deepstack",
    "deepstack_add",
    "deepstack_levels",
    "explain",
    "patch",
    "pixel_shuffle",
    "pixel_shuffle_linear",
    "place_embeddings",
    "repack",
    "rms_norm",
    "row_index",
    "unpatch",
    "use",
]
