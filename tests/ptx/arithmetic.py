"""Instructions on numbers: arithmetic, logic, shifts, comparisons, conversions, moves."""

from __future__ import annotations

import numpy as np

from tests.ptx.instructions import (
    Action,
    Function,
    elementwise,
    extended,
    instruction,
    only_type,
    saturated_to_1,
    unknown,
)
from tests.ptx.parse import Instruction, names_of
from tests.ptx.values import TYPES, UNSIGNED, Type, flush

ROUNDINGS = "rn rni rz rzi rmi rpi"


def _simple(names: str, flags: str, function: Function) -> None:
    instruction(names, flags)(lambda machine, ins: elementwise(machine, ins, function))


def _in_float64(function: Function) -> Function:
    """Compute an approximate instruction in float64 and round once, which is more accurate than a GPU."""
    return lambda *values: function(*(v.astype(np.float64) for v in values)).astype(values[0].dtype)


_simple("add", "rn ftz sat", np.add)
_simple("sub", "rn ftz sat", np.subtract)
_simple("neg", "ftz", np.negative)
_simple("abs", "ftz", np.abs)
_simple("ex2", "approx ftz", _in_float64(np.exp2))
_simple("lg2", "approx ftz", _in_float64(np.log2))
_simple("rsqrt", "approx ftz", _in_float64(lambda x: 1 / np.sqrt(x)))
_simple("sqrt", "rn approx ftz", np.sqrt)
_simple("rcp", "rn approx ftz", _in_float64(np.reciprocal))
_simple("tanh", "approx", _in_float64(np.tanh))
_simple("copysign", "", lambda sign, value: np.copysign(value, sign))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, np.ones_like(b), b)  # PTX leaves integer division by zero undefined
    quotient = np.abs(a.astype(object if a.dtype.itemsize == 8 else np.int64)) // np.abs(safe.astype(np.int64))
    return np.where((a < 0) != (safe < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, np.ones_like(b), b))


_simple("div", "full approx rn ftz", _divide)
_simple("rem", "", _remainder)


@instruction("max min", "NaN ftz")
def extremum(machine, ins: Instruction) -> Action:
    """Compute min or max; of a number and a NaN the result is the number, unless the instruction has .NaN."""
    name = ins.name + "imum" if "NaN" in ins.flags or only_type(ins).kind != "f" else "f" + ins.name
    function = getattr(np, name)
    return elementwise(machine, ins, lambda first, *rest: [first := function(first, other) for other in rest][-1])


@instruction("mul mad", "lo hi wide rn ftz")
def multiply(machine, ins: Instruction) -> Action:
    kind = only_type(ins)
    if kind.kind == "f":
        return elementwise(machine, ins, np.multiply) if ins.name == "mul" else fused(machine, ins)
    wide = Type(f"{kind.kind}{16 * kind.size}", kind.kind, 2 * kind.size) if kind.size < 8 else None
    result = wide if "wide" in ins.flags else kind
    first, second = (machine.source(arg, kind) for arg in ins.args[1:3])
    added = machine.source(ins.args[3], result) if ins.name == "mad" else None
    write = machine.target(ins.args[0])

    def product() -> np.ndarray:
        a, b = kind.unpack(first()), kind.unpack(second())
        if "lo" in ins.flags:
            return kind.pack(a * b)
        if wide is None:  # no dtype holds the 128-bit product
            high = np.array([int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)], object)
            return (high % (1 << 64)).astype(kind.raw)
        whole = a.astype(wide.number) * b.astype(wide.number)
        return wide.pack(whole) if "wide" in ins.flags else kind.pack(whole >> wide.number.type(8 * kind.size))

    if added is None:
        return lambda: write(product())
    return lambda: write(product() + added())


def _fused_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Multiply and add, rounding towards minus infinity."""
    exact = a.astype(np.float64) * b
    total = exact + c
    added = total - exact
    lost = (exact - (total - added)) + (c - added)  # what the sum has lost to rounding
    nearest = total.astype(a.dtype)
    above = (nearest > total) | ((nearest == total) & (lost < 0))
    return np.where(above, np.nextafter(nearest, a.dtype.type(-np.inf)), nearest)


@instruction("fma", "rn rm ftz relu")
def fused(machine, ins: Instruction) -> Action:
    """Multiply and add in float64, which holds every float32 product exactly; rare results are rounded twice."""
    if "relu" in ins.flags or ("rm" in ins.flags and only_type(ins).name != "f32"):
        raise unknown(ins, "." + ".".join(ins.flags))
    if "rm" in ins.flags:
        return elementwise(machine, ins, _fused_down)
    return elementwise(machine, ins, lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype))


# ---- logic and bits ----

_simple("and", "", np.bitwise_and)
_simple("or", "", np.bitwise_or)
_simple("xor", "", np.bitwise_xor)
_simple("not", "", np.invert)


@instruction("shl shr")
def shift(machine, ins: Instruction) -> Action:
    """Shift; a distance of the width or more gives zero or, for signed right shifts, only the sign."""
    kind, write = only_type(ins), machine.target(ins.args[0])
    value, distance = machine.source(ins.args[1], kind), machine.source(ins.args[2], TYPES["u32"])
    bits, function = 8 * kind.size, np.left_shift if ins.name == "shl" else np.right_shift

    def run() -> None:
        by = distance()
        moved = function(kind.unpack(value()), np.minimum(by, bits - 1).astype(kind.number))
        write(kind.pack(moved if kind.kind == "s" else np.where(by >= bits, kind.raw.type(0), moved)))

    return run


@instruction("shf", "l r wrap clamp")
def funnel_shift(machine, ins: Instruction) -> Action:
    write, u32 = machine.target(ins.args[0]), TYPES["u32"]
    low, high, distance = (machine.source(arg, u32) for arg in ins.args[1:4])

    def run() -> None:
        by = distance().astype(np.uint64)
        by = by & np.uint64(31) if "wrap" in ins.flags else np.minimum(by, np.uint64(32))
        both = high().astype(np.uint64) << np.uint64(32) | low()
        write(((both << by) >> np.uint64(32) if "l" in ins.flags else both >> by).astype(np.uint32))

    return run


@instruction("bfe")
def extract_bits(machine, ins: Instruction) -> Action:
    kind, write, u32 = only_type(ins), machine.target(ins.args[0]), TYPES["u32"]
    value, position, length = (machine.source(a, t) for a, t in zip(ins.args[1:], (kind, u32, u32), strict=True))
    last = np.uint64(8 * kind.size - 1)

    def run() -> None:
        bits, at, count = (f().astype(np.uint64) for f in (value, position, length))
        at, count = at & np.uint64(0xFF), np.minimum(count & np.uint64(0xFF), np.uint64(63))
        found = (bits >> np.minimum(at, np.uint64(63))) & ((np.uint64(1) << count) - np.uint64(1))
        if kind.kind == "s":
            top = np.where(count == 0, last, np.minimum(at + count - np.uint64(1), last))
            negative = (count > 0) & ((bits >> top) & np.uint64(1)).astype(bool)
            found = np.where(negative, found | (~np.uint64(0) << count), found)
        write(found.astype(kind.raw))

    return run


@instruction("bfi")
def insert_bits(machine, ins: Instruction) -> Action:
    kind, write, u32 = only_type(ins), machine.target(ins.args[0]), TYPES["u32"]
    kinds = (kind, kind, u32, u32)
    sources = [machine.source(a, t) for a, t in zip(ins.args[1:], kinds, strict=True)]

    def run() -> None:
        value, into, at, count = (f().astype(np.uint64) for f in sources)
        field = ((np.uint64(1) << count) - np.uint64(1)) << at
        write((((value << at) & field) | (into & ~field)).astype(kind.raw))

    return run


@instruction("prmt")
def permute_bytes(machine, ins: Instruction) -> Action:
    write, u32 = machine.target(ins.args[0]), TYPES["u32"]
    low, high, selector = (machine.source(arg, u32) for arg in ins.args[1:4])

    def run() -> None:
        both = low().astype(np.uint64) | high().astype(np.uint64) << np.uint64(32)
        chosen, result = selector().astype(np.uint64), np.uint64(0)
        for index in range(4):
            which = (chosen >> np.uint64(4 * index)) & np.uint64(0xF)
            byte = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
            result = result | np.where(which & np.uint64(8), sign, byte) << np.uint64(8 * index)
        write(np.atleast_1d(result).astype(np.uint32))

    return run


@instruction("lop3")
def three_way_logic(machine, ins: Instruction) -> Action:
    write, kind, table = machine.target(ins.args[0]), only_type(ins), int(ins.args[4], 0)
    sources = [machine.source(arg, kind) for arg in ins.args[1:4]]

    def run() -> None:
        values, result = [read() for read in sources], kind.raw.type(0)
        for row in (row for row in range(8) if table >> row & 1):
            a, b, c = (v if row >> (2 - place) & 1 else ~v for place, v in enumerate(values))
            result = result | (a & b & c)
        write(np.atleast_1d(result))

    return run


@instruction("popc clz brev bfind", "shiftamt")
def count_bits(machine, ins: Instruction) -> Action:
    kind, write = only_type(ins), machine.target(ins.args[0])
    read, width = machine.source(ins.args[1], kind), 8 * kind.size
    if ins.name == "bfind" and (kind.name != "u32" or "shiftamt" not in ins.flags):
        raise unknown(ins)

    def run() -> None:
        octets = np.ascontiguousarray(read()[:, None].view(np.uint8)[:, ::-1])
        bits = np.unpackbits(octets, axis=1)  # the highest first
        if ins.name == "popc":
            write(bits.sum(1, dtype=np.uint32))
        elif ins.name == "brev":
            write(np.packbits(bits[:, ::-1], axis=1)[:, ::-1].copy().view(kind.raw)[:, 0])
        else:  # the distance of the highest set bit from the top; bfind gives -1 for zero
            none = np.uint32(width if ins.name == "clz" else 0xFFFFFFFF)
            write(np.where(bits.any(1), bits.argmax(1).astype(np.uint32), none))

    return run


# ---- comparisons and choices ----

_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _comparison(name: str, kind: Type) -> Function | None:
    if kind.kind != "f":
        return _COMPARISONS.get(name)
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":  # PTX's ne is false for NaN, numpy's is true
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name in _COMPARISONS:
        return _COMPARISONS[name]
    ordered = _COMPARISONS.get(name.removesuffix("u"))
    return ordered and (lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b))


@instruction("setp", " ".join([*_COMPARISONS, "equ neu ltu leu gtu geu nan num and or xor ftz"]))
def compare(machine, ins: Instruction) -> Action:
    kind, (name, *flags) = only_type(ins), ins.flags
    function = _comparison(name, kind)
    if function is None:
        raise unknown(ins, name)
    first, second = (machine.source(arg, kind) for arg in ins.args[1:3])
    writes = [machine.target(arg) for arg in ins.args[0].split("|")]
    combine = next((getattr(np, f"logical_{flag}") for flag in flags if flag != "ftz"), None)
    other = machine.source(ins.args[3], TYPES["pred"]) if combine else None
    prepare = (lambda raw: flush(kind.unpack(raw))) if "ftz" in flags else kind.unpack

    def run() -> None:
        found = function(prepare(first()), prepare(second()))
        for write, value in zip(writes, (found, ~found), strict=False):
            write(combine(value, other()) if combine else value)

    return run


@instruction("selp")
def select(machine, ins: Instruction) -> Action:
    kind, write = only_type(ins), machine.target(ins.args[0])
    yes, no = (machine.source(arg, kind) for arg in ins.args[1:3])
    which = machine.source(ins.args[3], TYPES["pred"])
    return lambda: write(np.where(which(), yes(), no()))


# ---- conversions and moves ----

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", ROUNDINGS + " ftz sat")
def convert(machine, ins: Instruction) -> Action:
    to, source = ins.types
    write, rounding = machine.target(ins.args[0]), next((f for f in ins.flags if f in ROUNDINGS.split()), None)
    if "sat" in ins.flags and {to.name, source.name} != {"f32"}:
        raise unknown(ins, ".sat of these types")
    if to.half:
        if rounding != "rn" or source.name != "f32":
            raise unknown(ins)
        high, low = (machine.source(arg, source) for arg in ins.args[1:])

        def run() -> None:
            pair = np.broadcast_arrays(source.unpack(low()), source.unpack(high()))
            write(to.pack(np.stack(pair, axis=-1)))

        return run
    read, size = machine.source(ins.args[1], source), machine.size_of(ins.args[0])
    change = _conversion(ins, to, source, rounding)
    return lambda: write(extended(change(source.unpack(read())), to, size))


def _conversion(ins: Instruction, to: Type, source: Type, rounding: str | None) -> Function:
    """Make the function that converts numbers of one type to bits of another."""
    if to.kind == "f":
        if rounding in _TO_INTEGER:
            return lambda x: to.pack(_TO_INTEGER[rounding](x))
        if rounding not in (None, "rn"):
            raise unknown(ins, f".{rounding}")
        change = (lambda x: flush(x.astype(np.float32))) if "ftz" in ins.flags else lambda x: x
        if "sat" in ins.flags:
            return lambda x: to.pack(saturated_to_1(change(x)))
        return lambda x: to.pack(change(x).astype(to.number))
    if source.kind != "f":
        return lambda x: x.astype(to.number).view(to.raw)
    if rounding not in _TO_INTEGER:
        raise unknown(ins, "a rounding is missing")
    limits = np.iinfo(to.number)

    def saturated(x: np.ndarray) -> np.ndarray:
        whole = _TO_INTEGER[rounding](x.astype(np.float64))
        inside = (whole > limits.min) & (whole < limits.max)
        found = np.where(inside, whole, 0).astype(to.number)
        found = np.where(whole >= limits.max, limits.max, np.where(whole <= limits.min, limits.min, found))
        return found.astype(to.number).view(to.raw)  # NaN becomes 0

    return saturated


@instruction("mov")
def move(machine, ins: Instruction) -> Action:
    """Copy a register, split it into narrower ones, or join it from them."""
    kind, (to, source) = only_type(ins), ins.args
    if to.startswith("{"):
        parts = names_of(to)
        raw = UNSIGNED[kind.size // len(parts)]
        read, writes = machine.source(source, kind), [machine.target(part) for part in parts]

        def take_apart() -> None:
            pieces = np.ascontiguousarray(read()).view(raw).reshape(-1, len(parts))
            for column, write in enumerate(writes):
                write(np.ascontiguousarray(pieces[:, column]))

        return take_apart
    write = machine.target(to)
    if source.startswith("{"):
        parts = names_of(source)
        part = TYPES[f"b{8 * kind.size // len(parts)}"]
        reads = [machine.source(name, part) for name in parts]

        def put_together() -> None:
            pieces = np.stack(np.broadcast_arrays(*(read() for read in reads)), axis=-1)
            write(np.ascontiguousarray(pieces).view(kind.raw).reshape(-1))

        return put_together
    read = machine.source(source, kind)
    return lambda: write(read())


@instruction("cvta", "to global shared local const")
def generic_address(machine, ins: Instruction) -> Action:
    """Convert to a generic address: global ones are unchanged, shared and local ones are moved to their windows."""
    write, read = machine.target(ins.args[0]), machine.source(ins.args[1], only_type(ins))
    window = next((machine.windows[flag] for flag in ins.flags if flag in machine.windows), 0)
    change = np.subtract if "to" in ins.flags else np.add
    return lambda: write(change(read(), np.uint64(window)))


@instruction("fence membar griddepcontrol prefetch pmevent nanosleep", "proxy async shared acq_rel sc cta gl gpu sys")
def nothing(machine, ins: Instruction) -> Action:
    """Do nothing for a fence: the machine runs in order anyway."""
    return lambda: None
