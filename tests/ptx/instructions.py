"""The table of instructions and their common code. A handler prepares an instruction's action once per kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parse import Instruction, PtxError
from tests.ptx.values import Type, flush

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Action = Callable[[], None]
Handler = Callable[["Machine", Instruction], Action]
Function = Callable[..., np.ndarray]

WIDENING = ("add", "sub", "fma")  # those that take half precision beside float32

HANDLERS: dict[str, tuple[frozenset[str], Handler]] = {}


def instruction(names: str, flags: str = "") -> Callable[[Handler], Handler]:
    """Register the handler of some instructions, with all modifiers that it supports."""

    def register(handler: Handler) -> Handler:
        for name in names.split():
            HANDLERS[name] = frozenset(flags.split()), handler
        return handler

    return register


def unknown(ins: Instruction, what: str = "") -> PtxError:
    return PtxError(f"an instruction that is not known here{': ' if what else ''}{what}")


def assemble(machine: Machine, ins: Instruction) -> Action:
    """Make the action of an instruction.

    Raises:
        PtxError: for an instruction, a modifier or an operand that is not known.
    """
    if ins.name not in HANDLERS:
        raise unknown(ins)
    flags, handler = HANDLERS[ins.name]
    if not flags.issuperset(ins.flags):
        raise unknown(ins, "." + ", .".join(sorted(set(ins.flags) - flags)))
    return handler(machine, ins)


def only_type(ins: Instruction) -> Type:
    """Return the type of an instruction that has exactly one."""
    if len(ins.types) != 1:
        raise unknown(ins, "several types" if ins.types else "no type")
    return ins.types[0]


def elementwise(machine: Machine, ins: Instruction, function: Function) -> Action:
    """Apply a function of numbers, with .ftz and .sat; results are rounded to nearest, as numpy does."""
    if len(ins.types) == 2 and ins.name in WIDENING:
        return _widening(machine, ins, function)
    kind = only_type(ins)
    write = machine.target(ins.args[0])
    sources = [machine.source(arg, kind) for arg in ins.args[1:]]
    unpack, pack = kind.unpack, kind.pack
    flushed = "ftz" in ins.flags and kind.number == np.float32
    if "sat" in ins.flags:
        if kind.kind != "f":
            raise unknown(ins, ".sat of integers")
        inner, function = function, lambda *values: saturated_to_1(inner(*values))
    if flushed:
        return lambda: write(pack(flush(function(*[flush(unpack(read())) for read in sources]))))
    if kind.raw == kind.number:
        return lambda: write(function(*[read() for read in sources]).astype(kind.raw, copy=False))
    return lambda: write(pack(function(*[unpack(read()) for read in sources])))


def _widening(machine: Machine, ins: Instruction, function: Function) -> Action:
    """Apply a function to operands of half precision and a last one of float32, as .f32.bf16 does."""
    wide, narrow = ins.types
    if (wide.name, narrow.name) not in (("f32", "bf16"), ("f32", "f16")) or set(ins.flags) - {"rn"}:
        raise unknown(ins, "several types")
    write = machine.target(ins.args[0])
    firsts, last = [machine.source(arg, narrow) for arg in ins.args[1:-1]], machine.source(ins.args[-1], wide)

    def run() -> None:
        values = [narrow.unpack(read()).astype(np.float32) for read in firsts]
        write(wide.pack(function(*values, wide.unpack(last()))))

    return run


def saturated_to_1(values: np.ndarray) -> np.ndarray:
    """Clip to [0, 1], as the modifier .sat does; NaN becomes 0."""
    return np.clip(np.nan_to_num(values, nan=0.0), 0, 1)


def extended(raw: np.ndarray, kind: Type, size: int) -> np.ndarray:
    """Extend the bits of a type to a register of ``size`` bytes: by the sign if the type is signed, else by zeros."""
    if raw.dtype.itemsize == size:
        return raw
    wide = f"i{size}" if kind.kind == "s" else f"u{size}"
    return kind.unpack(raw).astype(wide).view(f"u{size}")
