"""The methods to reduce visual tokens; every file of this folder registers its own by name."""

import importlib
import pkgutil

from vlmfast.reduce.methods.layer_method import LayerMethod, check_layer
from vlmfast.reduce.methods.method import METHODS, Method, Named, PruningMethod, check_share, share, told
from vlmfast.reduce.methods.video_method import VideoMethod

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

CLASSES = {method.__name__: method for method in METHODS.values()}
globals().update(CLASSES)

__all__ = [
    "CLASSES",
    "METHODS",
    "LayerMethod",
    "Method",
    "Named",
    "PruningMethod",
    "VideoMethod",
    "check_layer",
    "check_share",
    "share",
    "told",
    *CLASSES,
]
