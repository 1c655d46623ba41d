"""Drop-in patches: ``patch(model)`` puts the ops of this package into one loaded model."""

from vlmfast.patches.apply import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
