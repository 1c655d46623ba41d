"""vlmfast: fused kernels for vision-language models, and drop-in patches for Hugging Face transformers."""

from vlmfast import backends, compat, hub, reduce
from vlmfast.deepstack_hooks import deepstack, deepstack_levels
from vlmfast.ops import PUBLIC
from vlmfast.patches import Patch, Warmup, patch, unpatch, warmup
from vlmfast.reduce.compress import compress_inputs
from vlmfast.reduce.methods import CLASSES
from vlmfast.registry import explain, use
from vlmfast.repacking import repack

__version__ = "0.1.0"
backends.load_extension()  # at import, so that a saved graph with compiled ops can be loaded
globals().update(PUBLIC | CLASSES)  # their types are in __init__.pyi, which `make docs` writes
__all__ = [
    *PUBLIC,
    *CLASSES,
    "Patch",
    "Warmup",
    "compat",
    "compress_inputs",
    "deepstack",
    "deepstack_levels",
    "explain",
    "hub",
    "patch",
    "reduce",
    "repack",
    "unpatch",
    "use",
    "warmup",
]
