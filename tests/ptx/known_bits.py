"""Find bits that are the same in every launch of a kernel, and changes of an instruction that thus have no effect.

A bit is 0, 1, or a symbol `(operand, place)` for an unknown bit, which equals only itself. The rule of an instruction
computes the bits of its result from those of its operands; a bit that no rule gives is an `Unknown`, equal to nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.ptx.parse import Instruction, Kernel, names_of
from tests.ptx.registers import NUMBER, number
from tests.ptx.values import Type

Bit = Any
Bits = list[Bit]
Known = dict[str, list[int | None]]  # register -> known bits, for each register that is ever written
# No integer argument of a launch is negative (`backend.pack` checks this), and each is at least a block below 2**31:
# see MAX_EXTENT in kernels/common/launch.py.
LARGEST = 2**14


class Unknown:
    """A bit about which nothing is known."""


def _and(a: Bit, b: Bit) -> Bit:
    if a in (0, 1) or b in (0, 1) or a == b:
        return 0 if 0 in (a, b) else (b if a == 1 else a)
    return Unknown()


def _or(a: Bit, b: Bit) -> Bit:
    if a in (0, 1) or b in (0, 1) or a == b:
        return 1 if 1 in (a, b) else (b if a == 0 else a)
    return Unknown()


def _xor(a: Bit, b: Bit) -> Bit:
    if a == b:
        return 0
    return b if a == 0 else a if b == 0 else 1 if {0, 1} == {a, b} else Unknown()


def _value(bits: Bits) -> int | None:
    """Return the number that the bits stand for, or None unless all are known."""
    return sum(bit << place for place, bit in enumerate(bits)) if all(bit in (0, 1) for bit in bits) else None


def _shifted(bits: Bits, by: int, filling: Bit) -> Bits:
    """Shift bits to the left, or to the right by a negative distance."""
    width = len(bits)
    by = max(-width, min(width, by))
    return [0] * by + bits[: width - by] if by >= 0 else bits[-by:] + [filling] * -by


def _extended(bits: Bits, width: int, signed: bool) -> Bits:
    return (bits + [bits[-1] if signed else 0] * (width - len(bits)))[:width]


def _zeros(bits: Bits) -> int:
    """Count the trailing zero bits."""
    return next((place for place, bit in enumerate(bits) if bit != 0), len(bits))


def _added(ins: Instruction, a: Bits, b: Bits) -> Bits:
    if 0 in (_value(a), _value(b)) and (ins.name == "add" or _value(b) == 0):
        return a if _value(b) == 0 else b
    if ins.name == "add" and all(_and(x, y) == 0 for x, y in zip(a, b, strict=True)):
        return [_or(x, y) for x, y in zip(a, b, strict=True)]
    low = min(_zeros(a), _zeros(b))
    return [0] * low + [Unknown() for _ in a[low:]]


def _multiplied(ins: Instruction, a: Bits, b: Bits) -> Bits:
    width = len(a) * (2 if "wide" in ins.flags else 1)
    factor = _value(b)
    if "hi" in ins.flags:
        return [Unknown() for _ in a]
    if factor and factor & (factor - 1) == 0 and 2 * factor < 1 << len(a):
        return _shifted(_extended(a, width, ins.types[0].kind == "s"), factor.bit_length() - 1, 0)
    low = min(width, _zeros(a) + _zeros(b))
    return [0] * low + [Unknown() for _ in range(width - low)]


def _permuted(ins: Instruction, a: Bits, b: Bits, selector: Bits) -> Bits:
    chosen, octets = _value(selector), [(a + b)[8 * index :][:8] for index in range(8)]
    if chosen is None:
        return [Unknown() for _ in a]
    nibbles = [chosen >> 4 * index & 15 for index in range(4)]
    return [bit for n in nibbles for bit in ([octets[n & 7][7]] * 8 if n & 8 else octets[n & 7])]


def _moved(ins: Instruction, a: Bits, b: Bits) -> Bits:
    by = _value(b)
    if by is None:
        return [Unknown() for _ in a]
    return _shifted(a, by, 0) if ins.name == "shl" else _shifted(a, -by, a[-1] if ins.types[0].kind == "s" else 0)


def _extracted(ins: Instruction, a: Bits, at: Bits, count: Bits) -> Bits:
    begin, length = _value(at), _value(count)
    if begin is None or length is None or ins.types[0].kind == "s":
        return [Unknown() for _ in a]
    return _extended((a[begin:] + [0] * 32)[:length], len(a), False)


def _differ(a: Bits, b: Bits) -> bool:
    """Tell whether some known bit proves two numbers different."""
    return any({x, y} == {0, 1} for x, y in zip(a, b, strict=True))


def _compared(ins: Instruction, a: Bits, b: Bits) -> Bits:
    """Return the bit of a comparison in a normal form, so that equivalent comparisons get equal bits.

    If two numbers are never equal, < becomes <=; if a number is a multiple of 16, "less than 1" is "less than 16".
    """
    name, kind, width = ins.flags[0], ins.types[0], len(a)
    if kind.kind == "f" or len(ins.flags) > 1:
        return [Unknown()]
    if name in ("eq", "ne"):
        return [int(name == "ne")] if _differ(a, b) else [(name, tuple(a), tuple(b))]
    less = name in ("lt", "le", "lo", "ls")
    limit = _value(b)
    if limit is None:  # a < b, or not a < b
        strict = name in ("lt", "lo", "ge", "hs") or (_differ(a, b))
        return [(kind.kind, less, strict, tuple(a), tuple(b))]
    if name in ("le", "ls", "gt", "hi"):
        limit += 1
    for _ in range(16):  # skip numbers that the first operand can never be, up to the largest
        if limit % (1 << width - 1) != (1 << width - 1) - 1 and _differ(a, [limit >> n & 1 for n in range(width)]):
            limit += 1
    return [(kind.kind, less, limit, tuple(a))]


RULES: dict[str, Callable[..., Bits]] = {
    "and": lambda ins, a, b: [_and(x, y) for x, y in zip(a, b, strict=True)],
    "or": lambda ins, a, b: [_or(x, y) for x, y in zip(a, b, strict=True)],
    "xor": lambda ins, a, b: [_xor(x, y) for x, y in zip(a, b, strict=True)],
    "mov": lambda ins, a: a,
    "shl": _moved,
    "shr": _moved,
    "add": _added,
    "sub": _added,
    "mul": _multiplied,
    "prmt": _permuted,
    "bfe": _extracted,
    "setp": _compared,
}


class KnownBits:
    """The known bits of each register of a kernel: bits that are the same at every write to it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.known: Known = {}
        self.written = [(ins, name) for ins in kernel.instructions for name in registers(kernel, ins)]
        count = Counter(name for _, name in self.written)
        self.arguments = {name for ins, name in self.written if count[name] == 1 and self._is_integer(ins)}
        before = None
        while self.known != before:
            before = dict(self.known)
            for ins, name in self.written:
                self._note(ins, name)

    def _is_integer(self, ins: Instruction) -> bool:
        """Tell whether an instruction loads an argument that is an integer or a pointer."""
        kind = self.kernel.param_types.get(ins.args[-1].strip("[] ")) if ins.name == "ld" else None
        return kind is not None and kind.kind in "us" and kind.size == ins.types[0].size

    def _note(self, ins: Instruction, name: str) -> None:
        bits = self.result(ins) if name == ins.args[0] else [None] * _width(self.kernel.registers[name])
        if bits is not None:
            plain = [bit if bit in (0, 1) else None for bit in bits]
            mine = self.known.get(name, plain)
            self.known[name] = [a if a == b else None for a, b in zip(mine, plain, strict=True)]

    def operand(self, text: str, width: int) -> Bits | None:
        """Return the bits of an operand; None for a register without any write so far."""
        if NUMBER.fullmatch(text):
            value = number(text) % (1 << width)
            return [value >> place & 1 for place in range(width)]
        bits: list[int | None] | None = [None] * width
        if text in self.kernel.registers:
            bits = self.known.get(text)
        elif text in ("%tid.x", "%laneid") and (text == "%laneid" or self.kernel.threads):
            most = 31 if text == "%laneid" else math.prod(self.kernel.threads) - 1
            bits = [None if most >> place else 0 for place in range(width)]
        elif text == "%ctaid.x":
            bits = [None] * 31 + [0] * (width - 31)
        if bits is None:
            return None
        return [(text, place) if bit is None else bit for place, bit in enumerate(_extended(bits, width, False))]

    def result(self, ins: Instruction) -> Bits | None:
        """Return the bits of an instruction's first register; None if it reads a register without any write so far."""
        width = _width(self.kernel.registers[ins.args[0]])
        nothing: Bits = [Unknown() for _ in range(width)]
        if ins.name == "cvt" and all(kind.kind != "f" for kind in ins.types):
            source = self.operand(ins.args[1], 8 * ins.types[1].size)
            signed = ins.types[1].kind == "s"
            return source and _extended(_extended(source, 8 * ins.types[0].size, signed), width, False)
        if ins.name in ("ld", "ldu") and ins.types[0].kind != "s":
            found = _extended(nothing[: 8 * ins.types[0].size], width, False)
            if self._is_integer(ins):
                low = 4 if ins.args[-1].strip("[] ") in self.kernel.divisible else 0
                found = [0] * low + found[low:-1] + [0]
            return found
        if ins.name not in RULES or any("{" in arg or "|" in arg for arg in ins.args) or len(ins.types) != 1:
            return nothing
        if ins.types[0].kind in "fp" and ins.name != "setp":
            return nothing
        sizes = [8 * ins.types[0].size] * len(ins.args)
        if ins.name in ("shl", "shr", "bfe"):
            sizes[2:] = [32] * len(sizes[2:])
        operands = [self.operand(arg, size) for arg, size in zip(ins.args[1:], sizes[1:], strict=True)]
        if any(bits is None for bits in operands):
            return None
        try:
            bits = _extended(RULES[ins.name](ins, *operands), width, False)
        except TypeError:  # the rule is for other operands
            return nothing
        if ins.name == "add" and ins.args[1] in self.arguments and (_value(operands[1]) or LARGEST) < LARGEST:
            bits[-1] = 0
        return bits

    def same(self, was: Instruction, changed: Instruction) -> bool:
        """Tell whether two instructions provably give the same result in every launch."""
        if was.args[:1] != changed.args[:1] or was.args[0] not in self.kernel.registers:
            return False
        return self.result(was) == self.result(changed)


def registers(kernel: Kernel, ins: Instruction) -> list[str]:
    """Return the registers that an instruction writes."""
    if ins.name in ("st", "red", "cp", "stmatrix", "bar", "bra"):
        return []
    names = [name for part in ins.args[:1] for piece in part.split("|") for name in names_of(piece)]
    return [name for name in names if name in kernel.registers]


def _width(kind: Type) -> int:
    return 1 if kind.kind == "p" else 8 * kind.size
