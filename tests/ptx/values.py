"""The types of PTX, which give the bits of a register their meaning."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
SIGNED = {1: np.dtype(np.int8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
FLOAT = {4: np.dtype(np.float32), 8: np.dtype(np.float64)}
BOOL = np.dtype(np.bool_)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; every NaN becomes PTX's canonical NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(values: np.ndarray) -> np.ndarray:
    """Flush subnormal float32 values to zeros of their sign, as the modifier .ftz does."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    subnormal = (bits & np.uint32(0x7F800000)) == 0
    return np.where(subnormal, bits & np.uint32(0x80000000), bits).view(np.float32)


@dataclass(frozen=True)
class Type:
    """One type: ``raw`` is the dtype of a register's bits; ``unpack`` and ``pack`` convert to numbers and back.

    Half-precision numbers are unpacked to float32; the two of a packed register form an array (threads, 2).
    """

    name: str
    kind: str  # "b" bits, "u" and "s" integers, "f" floating point, "p" predicate
    size: int  # bytes
    half: str | None = None  # of packed types: the type of each half

    @functools.cached_property
    def raw(self) -> np.dtype:
        return BOOL if self.kind == "p" else UNSIGNED[self.size]

    @functools.cached_property
    def number(self) -> np.dtype:
        """Return the dtype of unpacked numbers; for packed types, that of each half."""
        if self.half:
            return TYPES[self.half].number
        if self.kind == "f":
            return FLOAT[max(self.size, 4)]
        return SIGNED[self.size] if self.kind == "s" else self.raw

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        if self.half:
            half = TYPES[self.half]
            return half.unpack(np.ascontiguousarray(raw).view(half.raw)).reshape(-1, 2)
        if self.name == "bf16":
            return widen_bfloat16(raw)
        if self.name == "f16":
            return raw.view(np.float16).astype(np.float32)
        return raw.view(self.number) if self.kind in "sf" else raw

    def pack(self, numbers: np.ndarray) -> np.ndarray:
        if self.half:
            packed = TYPES[self.half].pack(numbers)
            return np.ascontiguousarray(packed).view(self.raw).reshape(-1)
        if self.name == "bf16":
            return round_to_bfloat16(numbers)
        if self.name == "f16":
            return numbers.astype(np.float16).view(np.uint16)
        if self.kind in "sf":
            return numbers.astype(self.number, copy=False).view(self.raw)
        return numbers.astype(self.raw, copy=False)


def _types() -> dict[str, Type]:
    found = {"pred": Type("pred", "p", 1), "bf16": Type("bf16", "f", 2)}
    for kind, bits in (("b", (8, 16, 32, 64)), ("u", (8, 16, 32, 64)), ("s", (8, 16, 32, 64)), ("f", (16, 32, 64))):
        found |= {f"{kind}{n}": Type(f"{kind}{n}", kind, n // 8) for n in bits}
    for half in ("f16", "bf16", "s16", "u16", "f32"):
        found[f"{half}x2"] = Type(f"{half}x2", found[half].kind, 2 * found[half].size, half)
    return found


TYPES = _types()
