"""A repair of Triton's interpreter: it truncates float32 to bfloat16, where every GPU rounds to nearest even.

Without it a bfloat16 kernel that is right on a GPU fails here, and one that is wrong there might pass.
"""

from __future__ import annotations

import numpy as np


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def repair() -> None:
    """Make the interpreter's conversions between float32 and bfloat16 exact, in this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << np.uint32(16)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = exact
