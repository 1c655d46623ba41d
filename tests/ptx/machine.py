"""Execute a kernel: its blocks, the order of their threads, barriers.

Each thread has its own place in the program. Of all threads of a batch of blocks, those that are least far in the
program run together, so that diverged threads meet again where their paths join. The order of threads is thus fixed;
the checks of shared memory ensure that another order would give the same result.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import tests.ptx.arithmetic
import tests.ptx.matrix  # noqa: F401  (they register their instructions)
from tests.ptx.access import DeviceAssertionError
from tests.ptx.copies import Groups
from tests.ptx.instructions import Action, assemble, unknown
from tests.ptx.memory import Constant, GlobalMemory, SharedMemory
from tests.ptx.order import Who
from tests.ptx.parse import Instruction, Kernel, PtxError, Variable, names_of, parse
from tests.ptx.registers import Reader, Registers
from tests.ptx.values import TYPES, UNSIGNED
from tests.ptx.warps import BIT, members, to_all

SHARED_BEGIN = 0x400  # sm_90 reserves the first KiB
MOST_STEPS = 1_000_000  # limit for a batch of blocks; a kernel that runs longer counts as endless
BATCH = 8192  # threads: more overflow the caches, fewer make array operations inefficient


@dataclass(frozen=True)
class Step:
    """An assembled instruction: its action, or its effect on the control flow."""

    action: Action | None
    branch: int | None  # the target of a branch
    control: str  # "", "branch", "exit", "barrier"
    predicate: int | None
    negated: bool
    members: Reader | None = None  # a mask of the lanes that wait for each other there


# Instructions for the lanes of a warp that their last operand names, and for all lanes of a warp.
OF_MEMBERS = {"shfl", "vote", "redux", "match", "elect"}
OF_WARPS = {"mma", "ldmatrix", "stmatrix", "wgmma"}
TOGETHER = OF_MEMBERS | OF_WARPS

# Where the generic addresses of shared and local memory begin, above all global addresses.
WINDOWS = {"shared": 1 << 60, "local": 1 << 61}


class Machine(Registers):
    """Runs the launches of one kernel, which it has assembled once."""

    def __init__(self, kernel: Kernel) -> None:
        constants = kernel.spaces.get("global", {})
        self.constants = {name: Constant(variable) for name, variable in constants.items()}
        offsets, self.static_shared = _offsets(kernel.spaces.get("shared", {}))
        self.static_shared = -(-self.static_shared // 128) * 128
        local, self.local_size = _offsets(kernel.spaces.get("local", {}))
        symbols = {name: constant.begin for name, constant in self.constants.items()} | local
        symbols |= {name: SHARED_BEGIN + offset for name, offset in offsets.items()}
        symbols |= dict.fromkeys(kernel.dynamic_shared, SHARED_BEGIN + self.static_shared)
        super().__init__(kernel, symbols)
        self.windows = WINDOWS
        self.call_params: dict[str, np.ndarray] = {}
        self.at = 0  # the running instruction
        self.ran = np.zeros(len(kernel.instructions), np.int64)  # how many threads have run each instruction
        self.most_steps, self.steps = MOST_STEPS, 0
        self.unit = min((_unit(ins) for ins in kernel.instructions), default=4)
        self.program = [self._step(at, ins) for at, ins in enumerate(kernel.instructions)]
        self.joins = {*kernel.labels.values(), *(at for at, step in enumerate(self.program) if step.members)}

    def _step(self, at: int, ins: Instruction) -> Step:
        self.at = at
        try:
            predicate = None if ins.predicate is None else self._register(ins.predicate)
            if ins.name == "bra":
                return Step(None, self.kernel.labels[ins.args[0]], "branch", predicate, ins.negated)
            if ins.name in ("ret", "exit"):
                return Step(None, None, "exit", predicate, ins.negated)
            if ins.name in ("bar", "barrier"):
                return self._barrier(ins, predicate)
            members_of = None
            if ins.name in TOGETHER:
                members_of = self.source(ins.args[-1] if ins.name in OF_MEMBERS else "-1", TYPES["u32"])
            return Step(assemble(self, ins), None, "", predicate, ins.negated, members_of)
        except PtxError as error:
            raise self._located(error) from None

    def _barrier(self, ins: Instruction, predicate: int | None) -> Step:
        if ins.flags == ("warp", "sync"):
            mask = self.source(ins.args[0], TYPES["u32"])
            return Step(lambda: members(self, mask) is None, None, "", predicate, ins.negated, mask)
        if ins.flags not in (("sync",), ("sync", "aligned")) or ins.args != ["0"]:
            raise unknown(ins, "a barrier that is not the whole block's")
        return Step(None, None, "barrier", predicate, ins.negated)

    def _located(self, error: Exception) -> Exception:
        ins = self.kernel.instructions[self.at]
        return type(error)(f"{error}\n  in {self.kernel.name}, instruction {self.at}: {ins.text}  ({ins.line})")

    # ---- memory of blocks and threads ----

    def shared_offsets(self, addresses: np.ndarray, lanes: np.ndarray, width: int, aligned: int) -> np.ndarray:
        return self.shared.offsets(addresses - SHARED_BEGIN, self.block_of[lanes], width, aligned)

    def who(self, lanes: np.ndarray) -> Who | None:
        """Return the block, the warp and the passed barriers of some threads, where races are looked for."""
        if not self.memory.ordered:
            return None
        block = self.block_of[lanes]
        return self.first_block + block, self.warp_of[lanes], self.shared.interval[block]

    def local_offsets(self, addresses: np.ndarray, lanes: np.ndarray, width: int) -> np.ndarray:
        if ((addresses < 0) | (addresses + width > self.local_size) | (addresses % width != 0)).any():
            raise PtxError(f"{width} bytes of local memory where a thread has none, or misaligned")
        return addresses + lanes * self.local_stride

    def read_tile(self, addresses: np.ndarray, thread: int) -> np.ndarray:
        """Read 16-bit elements of shared memory for the warpgroup that begins with a thread."""
        block = self.block_of[thread]
        offsets = self.shared.offsets(addresses - SHARED_BEGIN, block, 2, 2)
        self.shared.note_tile(offsets, block)
        return self.shared.content[2][offsets // 2]

    # ---- running ----

    def launch(
        self, memory: GlobalMemory, grid: Sequence[int], block: Sequence[int], params: bytes, dynamic_shared: int = 0
    ) -> None:
        """Run all blocks of a launch.

        Raises:
            PtxError: if the kernel does what no kernel may do; names the kernel, the instruction and its line.
            DeviceAssertionError: if an assertion of the kernel fails.
        """
        self.grid, self.block, self.params = grid, block, params.ljust(self.kernel.param_size, b"\0")
        self.memory, size = memory, math.prod(block)
        self.per_block = -(-size // 32) * 32  # whole warps; lanes behind the last thread never run
        self.absent = np.arange(self.per_block) >= size
        self.shared_size = self.static_shared + dynamic_shared
        if self.kernel.threads and math.prod(self.kernel.threads) != size:
            raise PtxError(f"{self.kernel.name} demands blocks of {self.kernel.threads}, got {block}")
        if self.kernel.most_threads and size > self.kernel.most_threads:
            raise PtxError(f"{self.kernel.name} allows blocks of {self.kernel.most_threads} threads, got {block}")
        memory.non_coherent = any("nc" in ins.flags for ins in self.kernel.instructions)
        for constant in self.constants.values():
            memory.allow(constant.begin, constant.allowed)
        memory.ready(min((_global_unit(ins) for ins in self.kernel.instructions), default=1))
        blocks, together = math.prod(grid), max(1, BATCH // self.per_block)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, blocks, together):
                    self._run_batch(first, min(together, blocks - first))
                memory.finish()
        except (PtxError, DeviceAssertionError) as error:
            raise self._located(error) from None
        finally:
            self._forget()

    def _forget(self) -> None:
        """Free registers and shared memory, which are gigabytes for the kernels of some ops."""
        self.values, self.special, self.shared, self.local = [], {}, None, {}

    def _run_batch(self, first: int, count: int) -> None:
        self._begin(first, count)
        threads = self.threads
        self.place = np.zeros(threads, np.int32)  # the next instruction of each thread
        self.exited, self.waiting = np.tile(self.absent, count), np.zeros(threads, np.bool_)
        self.steps = 0
        while not self.exited.all():
            ready = ~(self.exited | self.waiting)
            if not np.count_nonzero(ready):
                raise PtxError("a barrier that some threads of a block never reach")
            at, active = self._next(ready)
            self._advance(at, active, bool((active == ready).all()))
        self.copies.end()
        self.multiplications.end()

    def _next(self, ready: np.ndarray) -> tuple[int, np.ndarray]:
        """Choose those least far in the program; lanes wait at a collective instruction until its members are there.

        If nobody can go on, those least far do: the instruction then says which members are missing.
        """
        left, first = ready, None
        while np.count_nonzero(left):
            at = int(self.place[left].min())
            here = self.place == at
            active = left & here
            names = self.program[at].members
            if names is None:
                return at, active
            arrived = to_all(np.where(active.reshape(-1, 32), BIT, 0).sum(1, dtype=np.uint32))
            complete = active & ((self.whole(names()) & ~arrived) == 0)
            if np.count_nonzero(complete):
                return at, complete
            first = first or (at, active)
            left = left & ~here
        return first

    def _begin(self, first: int, count: int) -> None:
        thread, block = (
            np.tile(np.arange(self.per_block), count),
            np.repeat(np.arange(first, first + count), self.per_block),
        )
        special = {"%laneid": thread % 32, "%warpid": thread // 32}
        for name, number_, shape in (("tid", thread, self.block), ("ctaid", block, self.grid)):
            size = 1
            for axis, extent in zip("xyz", (*shape, 1, 1)[:3], strict=True):
                special[f"%{name}.{axis}"] = number_ // size % extent
                special[f"%n{name}.{axis}"] = np.array([extent])
                size *= extent
        self.reset(count * self.per_block, special)
        self.warp_of, self.block_of, self.first_block = (thread // 32).astype(np.int16), block - first, first
        self.shared = SharedMemory(count, self.shared_size, self.unit)
        self.local_stride = -(-self.local_size // 16) * 16
        local = np.full(max(16, self.threads * self.local_stride), 0xFF, np.uint8)
        self.local = {size: local.view(raw) for size, raw in UNSIGNED.items()}
        self.copies, self.multiplications = (Groups(self.threads, name) for name in ("an asynchronous copy", "a wgmma"))

    def _advance(self, at: int, active: np.ndarray, alone: bool) -> None:
        """Run some threads until they diverge, wait, end, or reach a place where others may join them."""
        full, many = bool(active.all()), int(np.count_nonzero(active))
        while True:
            self.at = at
            self.steps += 1
            if self.steps > self.most_steps:
                raise PtxError(f"more than {self.most_steps} steps: a loop that does not end")
            step = self.program[at]
            taken, count = self._taking(step, active, full, many)
            self.ran[at] += count
            self.mask = taken
            if step.control == "":
                if count:
                    step.action()
                at += 1
            elif step.control == "branch":
                if 0 < count < many:
                    self.place[active] = at + 1
                    self.place[taken] = step.branch
                    return
                at = step.branch if count else at + 1
            elif step.control == "exit":
                self.exited |= True if taken is None else taken
                if count == many:
                    return
                active = active & ~taken
                full, many, at = False, many - count, at + 1
            else:
                self._wait(active, count == many)
                at += 1
                self.place[active] = at
                if not full:
                    return
            if not alone and (at in self.joins or step.control == "branch"):
                self.place[active] = at
                return

    def _taking(self, step: Step, active: np.ndarray, full: bool, many: int) -> tuple[np.ndarray | None, int]:
        """Return which of the active threads run an instruction (None: all threads), and how many."""
        if step.predicate is None:
            return (None if full else active), many
        chosen = self.values[step.predicate]
        if step.negated:
            chosen = ~chosen
        if not full:
            chosen = active & chosen
        elif chosen.size == 1:
            return None, many if chosen[0] else 0
        count = int(np.count_nonzero(chosen))
        return (None if count == self.threads else chosen), count

    def _wait(self, active: np.ndarray, whole: bool) -> None:
        """Arrive at a barrier; blocks whose threads have all arrived go on."""
        if not whole:
            raise PtxError("a barrier for some of the threads that reach it")
        self.waiting |= active
        arrived = (self.waiting.reshape(-1, self.per_block) | self.absent).all(1)
        self.shared.interval[arrived] += 1
        self.waiting[np.repeat(arrived, self.per_block)] = False


def assembled(ptx: str, name: str) -> Machine:
    """Parse and assemble a kernel of a module.

    Meanwhile the garbage collector is off: it would take more time than this does, and none of the objects is garbage.
    Nor does it look at them later, until `backend.forget`.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        machine = Machine(parse(ptx, name))
        gc.freeze()
        return machine
    finally:
        if enabled:
            gc.enable()


def _unit(ins: Instruction) -> int:
    """Return the width of an instruction's accesses to shared memory, at most the 4 bytes that checks distinguish."""
    if ins.name in ("ld", "st", "atom", "red") and not {"global", "param", "local", "const"} & set(ins.flags):
        return min(4, ins.types[0].size)
    return {"ldmatrix": 2, "stmatrix": 2, "wgmma": 2}.get(ins.name, 4)


def _global_unit(ins: Instruction) -> int:
    """Return the width of an instruction's accesses to global memory, at most 16 bytes."""
    if ins.name not in ("ld", "st") or {"shared", "param", "local", "const"} & set(ins.flags):
        return 16
    return ins.types[0].size * max(len(names_of(arg)) for arg in ins.args)


def _offsets(variables: dict[str, Variable]) -> tuple[dict[str, int], int]:
    """Return the offset of each variable in its memory space, and the size of the space."""
    found, end = {}, 0
    for name, variable in variables.items():
        found[name] = -(-end // variable.align) * variable.align
        end = found[name] + variable.size
    return found, end
