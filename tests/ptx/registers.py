"""The registers of a batch of threads: one array per register, with one number per thread or one for all."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.parse import Kernel, PtxError
from tests.ptx.values import TYPES, UNSIGNED, Type

Reader = Callable[[], np.ndarray]
Writer = Callable[[np.ndarray], None]

# The content of unwritten registers, by size in bytes: NaN in every floating-point type, and not a valid address.
POISON = {1: 0xB5, 2: 0xFFB5, 4: 0xFFB5FFB5, 8: 0xFFF5FFB5FFB5FFB5}
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_LANEMASKS = {"eq": lambda one: one, "lt": lambda one: one - 1, "le": lambda one: 2 * one - 1}
_LANEMASKS |= {"gt": lambda one: ~(2 * one - 1), "ge": lambda one: ~(one - 1)}


def number(text: str) -> int:
    return int(text.rstrip("U"), 0)


class Registers:
    """The register file of a batch of threads, and which of them run the current instruction."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.kernel, self.symbols = kernel, symbols
        self.index = {name: index for index, name in enumerate(kernel.registers)}
        self.types = list(kernel.registers.values())
        self.values: list[np.ndarray] = []
        self.special: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None  # which threads take part; None for all
        self.threads = 0
        self.everyone = np.arange(0)

    def reset(self, threads: int, special: dict[str, np.ndarray]) -> None:
        """Start another batch of threads, with all registers unwritten."""
        self.threads, self.special, self.mask = threads, special, None
        self.everyone = np.arange(threads)
        self.values = [np.array([POISON[t.size]]).astype(t.raw) for t in self.types]

    def lanes(self) -> np.ndarray:
        """Return the numbers of the threads that take part."""
        return self.everyone if self.mask is None else np.flatnonzero(self.mask)

    def whole(self, value: np.ndarray) -> np.ndarray:
        """Return a contiguous array with one number per thread."""
        return value if value.size == self.threads else np.repeat(value, self.threads)

    def of(self, reader: Reader, lanes: np.ndarray) -> np.ndarray:
        """Return the values that some threads read."""
        value = reader()
        if lanes is self.everyone:
            return self.whole(value)
        return value[lanes] if value.size == self.threads else np.repeat(value, len(lanes))

    def spread(self, value: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Spread the values of some threads to an array with one number per thread; the others are arbitrary."""
        if lanes is self.everyone or value.size == 1:
            return value
        found = np.zeros(self.threads, value.dtype)
        found[lanes] = value
        return found

    def size_of(self, name: str) -> int:
        return self.types[self._register(name)].size

    def _register(self, name: str) -> int:
        if name not in self.index:
            raise PtxError(f"there is no register {name}")
        return self.index[name]

    def source(self, text: str, kind: Type) -> Reader:
        """Return a reader of the raw bits of an operand, as many as the type has: the low ones of a wider register."""
        if text.startswith("!"):
            inverted = self.source(text[1:], kind)
            return lambda: ~inverted()
        if text in self.index:
            at = self.index[text]
            held = self.types[at]
            if held.size < kind.size or (held.kind == "p") != (kind.kind == "p"):
                raise PtxError(f"{text} is .{held.name}, not .{kind.name}")
            if held.size == kind.size:
                return lambda: self.values[at]
            return lambda: self.values[at].astype(kind.raw)
        if text.startswith("%"):
            return self._special(text, kind)
        value = self._constant(text, kind)
        return lambda: value

    def _constant(self, text: str, kind: Type) -> np.ndarray:
        if kind.kind == "p":
            if text not in ("0", "1", "-1", "true", "false"):
                raise PtxError(f"not a predicate: {text}")
            return np.array([text not in ("0", "false")])
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", text):
            bits = int(text[2:], 16)
            wide = text[1] in "dD"
            given = np.array([bits], np.uint64 if wide else np.uint32).view(np.float64 if wide else np.float32)
            return given.astype(np.float32 if kind.size == 4 else np.float64).view(kind.raw)
        if NUMBER.fullmatch(text):
            return np.array([number(text) % (1 << 8 * kind.size)], UNSIGNED[8]).astype(kind.raw)
        found = re.fullmatch(r"([$\w]+)(?:\s*\+\s*(\d+))?", text)
        if found and found[1] in self.symbols:
            return np.array([self.symbols[found[1]] + int(found[2] or 0)], kind.raw)
        raise PtxError(f"an operand that is not known here: {text}")

    def _special(self, text: str, kind: Type) -> Reader:
        if text.startswith("%lanemask_"):
            mask = _LANEMASKS[text.removeprefix("%lanemask_")]
            return lambda: mask(np.uint64(1) << self.special["%laneid"].astype(np.uint64)).astype(kind.raw)
        if text not in ("%laneid", "%warpid") and not re.fullmatch(r"%n?(tid|ctaid)\.[xyz]", text):
            raise PtxError(f"a special register that is not known here: {text}")
        return lambda: self.special[text].astype(kind.raw)

    def target(self, text: str) -> Writer:
        """Return a writer to a register for the threads that take part; "_" discards the value."""
        if text == "_":
            return lambda value: None
        at = self._register(text)
        raw = self.types[at].raw

        def write(value: np.ndarray) -> None:
            if value.dtype != raw:
                raise PtxError(f"{value.dtype} is written to {text}, which is .{self.types[at].name}")
            self.values[at] = value if self.mask is None else np.where(self.mask, value, self.values[at])

        return write

    def address(self, text: str) -> Reader:
        """Return a reader of the address "[base+offset]", as int64."""
        found = re.fullmatch(r"\[\s*([%$\w@.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise PtxError(f"an address that is not known here: {text}")
        base, offset = found[1], number(found[2] or "0")
        if base in self.index:
            at = self.index[base]
            return lambda: self.values[at].astype(np.int64) + offset
        fixed = self._constant(base, TYPES["u64"]).astype(np.int64) + offset
        return lambda: fixed
