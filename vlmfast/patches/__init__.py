"""Drop-in patches: ``patch(model)`` puts the ops of this package into one loaded model."""

from vlmfast.patches.apply import Patch, patch, unpatch
from vlmfast.patches.warm_up import Warmup, warmup

__all__ = ["Patch", "Warmup", "patch", "unpatch", "warmup"]
