"""Patches for projects outside transformers, one module each: ``vlmfast.compat.<project>.patch(model)``.

They replace only the project's own methods. `vlmfast.patch` replaces these as well, together with the methods of the
language model and the vision tower.
"""

from vlmfast.compat import fourm, internvl, mgm, nanovlm, vita

__all__ = ["fourm", "internvl", "mgm", "nanovlm", "vita"]
