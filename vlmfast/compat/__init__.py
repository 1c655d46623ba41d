"""Patches for projects outside transformers, one module each: ``vlmfast.compat.<project>.patch(model)``."""

from vlmfast.compat import fourm, internvl, nanovlm, vita

__all__ = ["fourm", "internvl", "nanovlm", "vita"]
