"""Drop-in patches: ``patch(model)`` puts the ops of this package into one loaded Hugging Face model."""

from vlmfast.patches.apply import Patch, patch, unpatch
from vlmfast.patches.family import Family, families

__all__ = ["Family", "Patch", "families", "patch", "unpatch"]
