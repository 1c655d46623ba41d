"""Loads, stores and atomics of every memory space; asynchronous copies are in copies.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.instructions import Action, extended, instruction, only_type, unknown
from tests.ptx.memory import Where, neighbours, places
from tests.ptx.parse import Instruction, PtxError, names_of

SPACES = "param global shared local const"
VECTORS = "v2 v4 v8"
CACHES = "nc ca cg cs lu cv wb wt volatile relaxed weak acquire release gpu cta sys L1 L2 "
CACHES += "evict_first evict_last evict_normal evict_unchanged no_allocate 64B 128B 256B"


def _space(ins: Instruction) -> str:
    return next((flag.partition("::")[0] for flag in ins.flags if flag.partition("::")[0] in SPACES.split()), "generic")


def _windows(machine, space: str, addresses: np.ndarray) -> list[tuple[str, Where, np.ndarray]]:
    """Split generic addresses by memory space: (space, accesses, addresses); other addresses name their space."""
    if space == "const":
        space = "global"
    if space != "generic":
        return [(space, slice(None), addresses)]
    local, shared = machine.windows["local"], machine.windows["shared"]
    kinds = np.where(addresses >= local, 2, np.where(addresses >= shared, 1, 0))
    found = []
    for kind, (name, begin) in enumerate((("global", 0), ("shared", shared), ("local", local))):
        (where,) = np.nonzero(kinds == kind)
        if len(where):
            found.append((name, where, addresses[where] - begin))
    return found


def _load(machine, space: str, addresses, lanes, size: int, count: int, coherent: bool = True) -> list[np.ndarray]:
    if space == "global":
        return machine.memory.load(addresses, size, count, coherent, machine.who(lanes))
    width = size * count
    if space == "shared":
        offsets = machine.shared_offsets(addresses, lanes, width, width)
        machine.shared.note_load(offsets, width, machine.block_of[lanes], machine.warp_of[lanes])
        content = machine.shared.content[size]
    else:
        offsets, content = machine.local_offsets(addresses, lanes, width), machine.local[size]
    return neighbours(content, offsets, size, count)


def _store(machine, space: str, addresses, lanes, columns: Sequence[np.ndarray]) -> None:
    if space == "global":
        machine.memory.store(addresses, columns, machine.who(lanes))
        return
    size = columns[0].dtype.itemsize
    width = size * len(columns)
    if space == "shared":
        offsets = machine.shared_offsets(addresses, lanes, width, width)
        machine.shared.note_store(offsets, width, machine.block_of[lanes], machine.warp_of[lanes])
        machine.shared.store(offsets, columns, machine.warp_of[lanes])
        return
    offsets = machine.local_offsets(addresses, lanes, width)
    for place, column in zip(places(offsets, size, len(columns)), columns, strict=True):
        machine.local[size][place] = column


@instruction("ld ldu", f"{SPACES} {VECTORS} {CACHES}")
def load(machine, ins: Instruction) -> Action:
    kind, space, names = only_type(ins), _space(ins), names_of(ins.args[0])
    writes = [machine.target(name) for name in names]
    sizes = [kind.size if name == "_" else machine.size_of(name) for name in names]

    def deliver(columns: Sequence[np.ndarray], lanes: np.ndarray) -> None:
        for write, column, size in zip(writes, columns, sizes, strict=True):
            write(machine.spread(extended(column, kind, size), lanes))

    if space == "param":
        found = re.fullmatch(r"\[\s*([$\w]+)\s*(?:\+\s*(\d+))?\s*\]", ins.args[1])
        if found is None or found[1] not in machine.kernel.params:
            raise unknown(ins, "not a parameter")
        begin = machine.kernel.params[found[1]][0] + int(found[2] or 0)

        def read() -> None:
            raw = np.frombuffer(machine.params, kind.raw, len(names), begin)
            deliver([raw[i : i + 1] for i in range(len(names))], machine.everyone)

        return read

    address, coherent = machine.address(ins.args[1]), "nc" not in ins.flags

    def run() -> None:
        lanes = machine.lanes()
        parts = _windows(machine, space, machine.of(address, lanes))
        found = [_load(machine, name, at, lanes[where], kind.size, len(names), coherent) for name, where, at in parts]
        if len(parts) == 1:
            deliver(found[0], lanes)
            return
        columns = [np.empty(len(lanes), kind.raw) for _ in names]
        for (_, where, _), part in zip(parts, found, strict=True):
            for column, value in zip(columns, part, strict=True):
                column[where] = value
        deliver(columns, lanes)

    return run


@instruction("st", f"{SPACES} {VECTORS} {CACHES}")
def store(machine, ins: Instruction) -> Action:
    kind, space = only_type(ins), _space(ins)
    sources = [machine.source(name, kind) for name in names_of(ins.args[1])]
    if space == "param":  # a parameter of the call that follows

        def pass_on() -> None:
            machine.call_params[ins.args[0].strip("[ ]").partition("+")[0]] = machine.whole(sources[0]())

        return pass_on
    address = machine.address(ins.args[0])

    def run() -> None:
        lanes = machine.lanes()
        columns = [machine.of(source, lanes) for source in sources]
        for name, where, at in _windows(machine, space, machine.of(address, lanes)):
            _store(machine, name, at, lanes[where], [column[where] for column in columns])

    return run


_ATOMICS: dict[str, Callable] = {
    "add": lambda old, value: old + value,
    "min": min,
    "max": max,
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda old, value: value,
}


@instruction("atom red", f"global shared relaxed acq_rel gpu cta {' '.join(_ATOMICS)}")
def atomic(machine, ins: Instruction) -> Action:
    """Apply an atomic operation one thread after another, in the order of their numbers."""
    kind, space, returns = only_type(ins), _space(ins), ins.name == "atom"
    if kind.kind == "f" or kind.size < 4:
        raise unknown(ins, "an atomic of this type")
    function = next(_ATOMICS[flag] for flag in ins.flags if flag in _ATOMICS)
    write = machine.target(ins.args[0] if returns else "_")
    address, source = machine.address(ins.args[-2]), machine.source(ins.args[-1], kind)

    def run() -> None:
        lanes = machine.lanes()
        values = kind.unpack(machine.of(source, lanes))
        old = np.zeros(machine.threads, kind.raw)
        for name, where, at in _windows(machine, space, machine.of(address, lanes)):
            some = lanes[where]
            if name == "shared":
                offsets = machine.shared_offsets(at, some, kind.size, kind.size)
                machine.shared.note_atomic(offsets, kind.size, machine.block_of[some], machine.warp_of[some])
                content = machine.shared.content[kind.size].view(kind.number)
                found = [(content, int(i)) for i in offsets // kind.size]
            elif name == "global":
                found = [machine.memory.element(int(a), kind.number) for a in at]
            else:
                raise PtxError("an atomic in local memory")
            for lane, value, (content, place) in zip(some, values[where], found, strict=True):
                before = content[place]
                old[lane] = before.view(kind.raw)
                content[place] = function(before, value)
        write(old)

    return run


@instruction("call", "uni")
def call(machine, ins: Instruction) -> Action:
    """Handle the only known call, which reports a failed assertion."""
    if "__assertfail" not in " ".join(ins.args):
        raise unknown(ins)

    def run() -> None:
        lane = machine.lanes()[0]
        texts = (machine.memory.text(int(machine.call_params[f"param{i}"][lane])) for i in (0, 1))
        raise DeviceAssertionError(f"device-side assertion: {' in '.join(texts)}")

    return run


@instruction("trap")
def trap(machine, ins: Instruction) -> Action:
    def run() -> None:
        raise DeviceAssertionError("device-side assertion: trap")

    return run


class DeviceAssertionError(RuntimeError):
    """An assertion of a kernel failed; like torch's error for device-side assertions, it is a RuntimeError."""
