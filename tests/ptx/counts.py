"""What a launch did, from how often the machine ran each instruction: the bytes that it moved, and its instructions."""

from __future__ import annotations

from typing import Any

from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction


def moves(ins: Instruction, kind: str) -> int:
    """Return the bytes that one thread loads from ("ld") or stores to ("st") global memory by an instruction."""
    if kind == "ld" and ins.name == "cp" and "global" in ins.flags and len(ins.args) > 2:
        return int(ins.args[2], 0)
    if ins.name != kind or "global" not in ins.flags:
        return 0
    count = next((int(flag[1:]) for flag in ins.flags if flag in ("v2", "v4", "v8")), 1)
    return count * ins.types[-1].size


def issued(machine: Machine, ran: Any) -> int:
    """Count the instructions of a launch, without moves between registers."""
    pairs = zip(machine.kernel.instructions, ran, strict=True)
    return sum(int(number) for ins, number in pairs if ins.name != "mov")


def moved(machine: Machine, ran: Any, tensors: int) -> tuple[int, int]:
    """Return the bytes of rows that a launch reads, those of its widest loads up to a limit, and those that it stores.

    The limit, the bytes of all tensors less those that are stored, counts bytes once that are loaded repeatedly.
    """
    counted = [(ins, int(number)) for ins, number in zip(machine.kernel.instructions, ran, strict=True)]
    stores = sum(moves(ins, "st") * number for ins, number in counted)
    sizes = [(moves(ins, "ld"), number) for ins, number in counted]
    widest = max(size for size, _ in sizes)
    loads = sum(size * number for size, number in sizes if size == widest)
    return min(loads, tensors - stores), stores
