"""Patches for projects outside transformers, one module each: ``vlmfast.compat.<project>.patch(model)``."""

from vlmfast.compat import fourm, nanovlm

__all__ = ["fourm", "nanovlm"]
