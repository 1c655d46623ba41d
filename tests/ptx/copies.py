"""Asynchronous operations, which are executed as late as a program may expect: when it waits for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.instructions import Action, instruction, unknown
from tests.ptx.parse import Instruction, PtxError
from tests.ptx.registers import number
from tests.ptx.values import TYPES

Finish = Callable[[np.ndarray], None]  # finishes an operation for the threads that are true in the argument


class Groups:
    """The operations that each thread has issued and not waited for yet, in committed groups."""

    def __init__(self, threads: int, name: str) -> None:
        self.name = name
        self.committed = np.zeros(threads, np.int32)  # number of groups that each thread has committed
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, Finish]] = []

    def issue(self, lanes: np.ndarray, finish: Finish) -> None:
        self.pending.append((lanes, self.committed[lanes], np.zeros(len(lanes), np.bool_), finish))

    def commit(self, lanes: np.ndarray) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, left: int) -> None:
        """Finish all but the last ``left`` groups of some threads."""
        waiting = np.zeros(len(self.committed), np.bool_)
        waiting[lanes] = True
        kept = []
        for issued, group, done, finish in self.pending:
            ready = waiting[issued] & (group < self.committed[issued] - left) & ~done
            if ready.any():
                finish(ready)
                done |= ready
            if not done.all():
                kept.append((issued, group, done, finish))
        self.pending = kept

    def end(self) -> None:
        if self.pending:
            raise PtxError(f"{self.name} that nobody has waited for")


@instruction("cp", "async commit_group wait_group wait_all ca cg shared global L2::128B L2::256B L2::64B")
def copy(machine, ins: Instruction) -> Action:
    """Execute cp.async: a copy to shared memory that arrives when its group is waited for."""
    if ins.flags[:1] != ("async",):
        raise unknown(ins)
    if "commit_group" in ins.flags:
        return lambda: machine.copies.commit(machine.lanes())
    if "wait_group" in ins.flags:
        left = number(ins.args[0])
        return lambda: machine.copies.wait(machine.lanes(), left)
    if "wait_all" in ins.flags:

        def all_of_them() -> None:
            machine.copies.commit(machine.lanes())
            machine.copies.wait(machine.lanes(), 0)

        return all_of_them
    to, source, width = machine.address(ins.args[0]), machine.address(ins.args[1]), number(ins.args[2])
    taken = machine.source(ins.args[3], TYPES["u32"]) if len(ins.args) > 3 else lambda: np.array([width], np.uint32)
    if width not in (4, 8, 16):
        raise unknown(ins, f"{width} bytes")
    size = min(width, 8)

    def issue() -> None:
        lanes = machine.lanes()
        places = machine.shared_offsets(machine.of(to, lanes), lanes, width, width)
        bytes_taken, addresses = machine.of(taken, lanes), machine.of(source, lanes)
        some = bytes_taken > 0
        if (bytes_taken[some] != width).any():
            raise PtxError("an asynchronous copy of a part of its bytes")
        columns = [np.zeros(len(lanes), f"u{size}") for _ in range(width // size)]
        if some.any():
            for column, found in zip(columns, machine.memory.load(addresses[some], size, len(columns)), strict=True):
                column[some] = found
        blocks, warps = machine.block_of[lanes], machine.warp_of[lanes]
        machine.shared.note_start(places, width, blocks, warps)

        def arrive(ready: np.ndarray) -> None:
            at = places[ready]
            machine.shared.note_arrival(at, width, blocks[ready], warps[ready])
            machine.shared.store(at, [column[ready] for column in columns], warps[ready])

        machine.copies.issue(lanes, arrive)

    return issue
