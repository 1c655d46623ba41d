"""vlmfast: fused kernels for vision-language models, and drop-in patches for Hugging Face transformers."""

from vlmfast import compat, reduce
from vlmfast.deepstack_hooks import deepstack, deepstack_levels
from vlmfast.ops.attention_scores import cls_attention, received_attention
from vlmfast.ops.masked_rows import compact_tokens, deepstack_add, place_embeddings, row_index
from vlmfast.ops.pixel_shuffle import pixel_shuffle, pixel_shuffle_linear
from vlmfast.ops.pixel_shuffle_gemm import pixel_shuffle_gemm as _candidate  # noqa: F401  (it registers the op)
from vlmfast.ops.rms_norm import add_rms_norm, rms_norm
from vlmfast.ops.token_merge import merge_tokens, top_tokens, visionzip
from vlmfast.patches import Patch, patch, unpatch
from vlmfast.reduce.compress import compress_inputs
from vlmfast.reduce.methods import EvenTokens, RandomTokens, VisionZip
from vlmfast.registry import explain, use
from vlmfast.repacking import repack

__version__ = "0.1.0"
__all__ = [
    "EvenTokens",
    "Patch",
    "RandomTokens",
    "VisionZip",
    "add_rms_norm",
    "cls_attention",
    "compact_tokens",
    "compat",
    "compress_inputs",
    "deepstack",
    "deepstack_add",
    "deepstack_levels",
    "explain",
    "merge_tokens",
    "patch",
    "pixel_shuffle",
    "pixel_shuffle_linear",
    "place_embeddings",
    "received_attention",
    "reduce",
    "repack",
    "rms_norm",
    "row_index",
    "top_tokens",
    "unpatch",
    "use",
    "visionzip",
]
