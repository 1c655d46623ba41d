"""Patches of projects outside transformers alone, one module each: ``vlmfast.compat.<project>.patch(model)``.

`vlmfast.patch` replaces the same methods, and those of the language model and the tower around them.
"""

from vlmfast.compat import fourm, internvl, mgm, nanovlm, vita

__all__ = ["fourm", "internvl", "mgm", "nanovlm", "vita"]
