"""Instructions in which the threads of a warp exchange values."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tests.ptx.instructions import Action, instruction, only_type, unknown
from tests.ptx.parse import Instruction, PtxError
from tests.ptx.registers import Reader
from tests.ptx.values import TYPES, Type

LANE = np.arange(32)
BIT = np.uint32(1) << LANE.astype(np.uint32)
ALL = 0xFFFFFFFF


def taking_part(machine) -> np.ndarray:
    """Return which lanes of each warp run the instruction: (warps, 32) bool."""
    mask = np.ones(machine.threads, np.bool_) if machine.mask is None else machine.mask
    return mask.reshape(-1, 32)


def members(machine, read: Reader) -> np.ndarray:
    """Return the lanes that an instruction's member mask names, (warps, 32); all of them must run it."""
    names, here = read(), taking_part(machine)
    if names.size == 1 and names[0] == ALL and (machine.mask is None or (here.any(1) == here.all(1)).all()):
        return here
    named = machine.whole(names).reshape(-1, 32)
    mask = np.where(here, named, 0).max(1, keepdims=True)
    if ((named != mask) & here).any():
        raise PtxError("the lanes of a warp name different members")
    wanted = (mask & BIT) > 0
    if (wanted & ~here).any():
        raise PtxError("a lane that is named as a member does not take part")
    if (here & ~wanted).any():
        raise PtxError("a lane takes part that is not named as a member")
    return here


def whole_warps(machine) -> np.ndarray:
    """Return which warps run an instruction that needs all of their lanes: (warps,) bool."""
    here = taking_part(machine)
    if (here.any(1) != here.all(1)).any():
        raise PtxError("not all lanes of a warp take part")
    return here.all(1)


def by_warp(machine, read: Reader) -> np.ndarray:
    return machine.whole(read()).reshape(-1, 32)


def to_all(values: np.ndarray) -> np.ndarray:
    """Repeat one value per warp for each of its lanes."""
    return np.repeat(values, 32)


@instruction("shfl", "sync up down bfly idx")
def shuffle(machine, ins: Instruction) -> Action:
    if "sync" not in ins.flags:
        raise unknown(ins, "without .sync")
    mode, u32 = ins.flags[1], TYPES["u32"]
    writes = [machine.target(name) for name in ins.args[0].split("|")]
    value, distance, limits, names = (machine.source(arg, u32) for arg in ins.args[1:5])

    def others(by: Any, limit: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane that each lane reads, and whether it is within its segment."""
        by, clamp, segment = by & 31, limit & 31, limit >> 8 & 31
        last = (LANE & segment) | (clamp & ~segment)
        if mode == "idx":
            other = (LANE & segment) | (by & ~segment)
        else:
            other = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by}[mode]
        inside = other >= last if mode == "up" else other <= last
        return np.where(inside, other, LANE), inside

    same_others = functools.cache(others)

    def run() -> None:
        here, values = members(machine, names), by_warp(machine, value)
        by, limit = distance(), limits()
        same = by.size == limit.size == 1  # for all lanes
        if same:
            other, inside = same_others(int(by[0]), int(limit[0]))
            found = values.take(other, 1)
        else:
            other, inside = others(*(machine.whole(x).astype(np.int64).reshape(-1, 32) for x in (by, limit)))
            found = np.take_along_axis(values, other, 1)
        if machine.mask is not None:
            there = here.take(other, 1) if same else np.take_along_axis(here, other, 1)
            if np.count_nonzero(here & ~there):
                raise PtxError("a shuffle reads a lane that does not take part")
        writes[0](found.reshape(-1))
        for write in writes[1:]:
            write(np.broadcast_to(inside, here.shape).reshape(-1))

    return run


@instruction("redux", "sync add min max and or xor NaN")
def reduce(machine, ins: Instruction) -> Action:
    kind, write = only_type(ins), machine.target(ins.args[0])
    value, names = machine.source(ins.args[1], kind), machine.source(ins.args[2], TYPES["u32"])
    function, neutral = _of_floats(ins) if kind.kind == "f" else _of_integers(ins, kind)

    def run() -> None:
        here = members(machine, names)
        values = np.where(here, kind.unpack(by_warp(machine, value)), kind.number.type(neutral))
        write(to_all(kind.pack(function.reduce(values, axis=1, dtype=kind.number))))

    return run


def _of_floats(ins: Instruction) -> tuple[np.ufunc, float]:
    """Return the extremum of an instruction, which leaves out NaN unless it has .NaN, and what does not change it."""
    name = ins.flags[1]
    if name not in ("min", "max") or only_type(ins).name != "f32":
        raise unknown(ins)
    if "NaN" in ins.flags:
        return (np.minimum, np.inf) if name == "min" else (np.maximum, -np.inf)
    return (np.fmin if name == "min" else np.fmax), np.nan


def _of_integers(ins: Instruction, kind: Type) -> tuple[np.ufunc, int]:
    limits = np.iinfo(kind.number)
    found: tuple[np.ufunc, int] = {
        "add": (np.add, 0),
        "min": (np.minimum, limits.max),
        "max": (np.maximum, limits.min),
        "and": (np.bitwise_and, -1 if kind.kind == "s" else limits.max),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[ins.flags[1]]
    return found


@instruction("vote", "sync ballot any all")
def vote(machine, ins: Instruction) -> Action:
    write = machine.target(ins.args[0])
    question, names = machine.source(ins.args[1], TYPES["pred"]), machine.source(ins.args[2], TYPES["u32"])

    def run() -> None:
        here, yes = members(machine, names), by_warp(machine, question)
        if "ballot" in ins.flags:
            write(to_all(np.where(yes & here, BIT, 0).sum(1, dtype=np.uint32)))
        else:
            write(to_all((yes & here).any(1) if "any" in ins.flags else (yes | ~here).all(1)))

    return run


@instruction("match", "any sync")
def match(machine, ins: Instruction) -> Action:
    kind, write = only_type(ins), machine.target(ins.args[0])
    value, names = machine.source(ins.args[1], kind), machine.source(ins.args[2], TYPES["u32"])

    def run() -> None:
        here, values = members(machine, names), by_warp(machine, value)
        alike = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        write(np.where(alike, BIT, 0).sum(2, dtype=np.uint32).reshape(-1))

    return run


@instruction("activemask")
def active_mask(machine, ins: Instruction) -> Action:
    write = machine.target(ins.args[0])
    return lambda: write(to_all(np.where(taking_part(machine), BIT, 0).sum(1, dtype=np.uint32)))


@instruction("elect", "sync")
def elect(machine, ins: Instruction) -> Action:
    """Elect the lowest member."""
    leader, chosen = (machine.target(name) for name in ins.args[0].split("|"))
    names = machine.source(ins.args[1], TYPES["u32"])

    def run() -> None:
        first = members(machine, names).argmax(1)
        leader(to_all(first.astype(np.uint32)))
        chosen((first[:, None] == LANE).reshape(-1))

    return run
