"""The releases of transformers that vlmfast is written for."""

from __future__ import annotations

import sys

KNOWN = ("4.57.6", "5.17.0", "5.23.0")  # the tests of patches run under each


def newer_transformers() -> str | None:
    """Return the version of the loaded transformers if it is of a later minor release than all known; else None."""
    version = str(getattr(sys.modules.get("transformers"), "__version__", "0.0"))
    newest = max(_minor(release) for release in KNOWN)
    return version if _minor(version) > newest else None


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
