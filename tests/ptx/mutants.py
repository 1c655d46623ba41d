"""Kernels with one instruction changed: does a test of the op's samples fail?

    TRITON_INTERPRET=1 python -m tests.ptx.mutants 300

draws that many changes of the kernels that a real shape of each op runs, and prints those that nothing noticed. A
change is dead as soon as a call fails, the real one or one of the generated tests: it does what no kernel may do, or
its result is wrong. `received_attention` is left out: its real shapes take minutes each.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

import vlmfast
from tests.helpers import interpreter, traffic
from tests.helpers.cases import calls, outputs, widened
from tests.helpers.rounding import assert_within
from tests.ptx import backend
from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction, Kernel
from vlmfast import backends
from vlmfast.registry import Op

STEPS = 100_000  # more than any sample takes: what takes more does not end
NOTHING = Instruction("fence", (), (), [], text="nothing")
# What each name, or comparison, is taken for.
OTHERS = {"add": "sub", "sub": "add", "max": "min", "min": "max", "and": "or", "or": "and", "shl": "shr", "mul": "add"}
OTHERS |= {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "bfly": "up", "up": "down"}


@dataclass(frozen=True)
class Mutant:
    """One instruction of a kernel, and what stands in its place."""

    kernel: str
    at: int
    was: Instruction
    changed: Instruction
    excuse: str = ""  # why it may be no fault at all

    def __str__(self) -> str:
        return f"{self.kernel} {self.at}: {self.was.text}  ->  {self.changed.text}  ({self.was.line})"

    def of(self, kernel: Kernel) -> Machine:
        instructions = [*kernel.instructions[: self.at], self.changed, *kernel.instructions[self.at + 1 :]]
        machine = Machine(replace(kernel, instructions=instructions))
        machine.most_steps = STEPS
        return machine


def synchronises(ins: Instruction) -> bool:
    """Whether an instruction only orders others: a barrier, a wait, a commit."""
    groups = {"commit_group", "wait_group", "wait_all"}
    return ins.name in ("bar", "barrier") or (ins.name in ("cp", "wgmma") and bool(groups & set(ins.flags)))


def dropped(kernel: Kernel) -> list[Mutant]:
    """The kernel without one of its barriers, waits and commits."""
    found = [(at, ins) for at, ins in enumerate(kernel.instructions) if synchronises(ins)]
    groups = [(at, "commit_group" in ins.flags) for at, ins in found if ins.name == "cp"]
    joining = {at for (at, commit), (_, another) in pairwise(groups) if commit and another}
    excuse = "its copies join the next group, which is waited for no later"
    return [Mutant(kernel.name, at, ins, NOTHING, excuse if at in joining else "") for at, ins in found]


def changed(kernel: Kernel) -> list[Mutant]:
    """The kernel with one operation taken for another, a number one larger, a store or a copy left out."""
    return [
        Mutant(kernel.name, at, ins, other) for at, ins in enumerate(kernel.instructions) for other in _changes(ins)
    ]


def _changes(ins: Instruction) -> Iterator[Instruction]:
    if ins.name in ("ret", "bra", "trap", "call", "wgmma", "mma", "fence") or synchronises(ins) or "param" in ins.flags:
        return
    if ins.name in ("st", "cp", "stmatrix"):
        yield NOTHING
        return
    if ins.name in OTHERS and "wide" not in ins.flags:
        flags = tuple(flag for flag in ins.flags if flag not in ("lo", "hi"))
        yield _with(ins, name=OTHERS[ins.name], flags=flags)
    for place, flag in enumerate(ins.flags):
        if flag in OTHERS and ins.name in ("setp", "shfl", "redux"):
            yield _with(ins, flags=(*ins.flags[:place], OTHERS[flag], *ins.flags[place + 1 :]))
    for place, arg in enumerate(ins.args):
        if re.fullmatch(r"\d+", arg) and ins.name != "shfl":
            yield _with(ins, args=[*ins.args[:place], str(int(arg) + 1), *ins.args[place + 1 :]])


def _with(ins: Instruction, **changes: Any) -> Instruction:
    other = replace(ins, **changes)
    return replace(other, text=f"{other.opcode} {', '.join(other.args)}")


@dataclass
class Call:
    """A call of an op with what it must give, and the kernels that it runs."""

    args: tuple[Any, ...]
    defined: tuple[torch.Tensor, ...]
    exact: tuple[torch.Tensor, ...]
    kernels: set[tuple[str, str]] = field(default_factory=set)


class Subject:
    """An op's calls on one backend, unchanged: each passes."""

    def __init__(self, op: Op, place: str, every_call: Iterable[tuple[Any, ...]]) -> None:
        self.place, self.run, self.calls = place, op.backend(place).run, []
        backend.machines.clear()
        for args in every_call:
            if op.backend(place).unsupported(*args) is None:
                call = Call(args, outputs(op.reference(*args)), outputs(op.reference(*widened(args))))
                before = {key: int(machine.ran.sum()) for key, machine in backend.machines.items()}
                self.check(call)
                ran = backend.machines.items()
                call.kernels = {key for key, machine in ran if int(machine.ran.sum()) > before.get(key, 0)}
                self.calls.append(call)
        self.kernels = {key: machine.kernel for key, machine in backend.machines.items()}

    def check(self, call: Call) -> None:
        with vlmfast.use(self.place):
            assert_within(outputs(self.run(*call.args)), call.defined, call.exact)

    def notices(self, key: tuple[str, str], mutant: Mutant) -> str | None:
        """Say what was noticed of a change, or None."""
        with self._in_place(key, mutant):
            for call in (call for call in self.calls if key in call.kernels):
                try:
                    self.check(call)
                except Exception as error:  # whatever it is
                    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    @contextlib.contextmanager
    def _in_place(self, key: tuple[str, str], mutant: Mutant) -> Iterator[None]:
        original = backend.machines[key]
        backend.machines[key] = mutant.of(original.kernel)
        try:
            yield
        finally:
            backend.machines[key] = original


def survivors_of_drops(op: Op, place: str, dtype: torch.dtype) -> list[Mutant]:
    """The barriers, waits and commits of a line whose loss no specialisation of their kernel betrays."""
    torch.manual_seed(0)
    subject, dead = Subject(op, place, calls(op, "cpu", dtype)), {}
    for key, kernel in subject.kernels.items():
        numbers: Counter[tuple[str, ...]] = Counter()
        for mutant in dropped(kernel):
            where = mutant.kernel, mutant.was.line, mutant.was.opcode
            numbers[where] += 1  # several of a line are told apart by their order
            this = *where, numbers[where]
            if dead.get(this) is not True:
                dead[this] = subject.notices(key, mutant) is not None or mutant
    return [found for found in dead.values() if found is not True]


def main(count: int, names: list[str], place: str = "ptx_sm_90") -> None:
    interpreter.repair()
    backends.LOADERS |= backend.LOADERS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    ops = [op for op in traffic.BOUND_BY_MEMORY if op.compose is None and (not names or op.name in names)]
    draw = random.Random(0)
    dead = total = 0
    for op in ops:
        torch.manual_seed(0)
        _, real = traffic.workload(op)
        subject = Subject(op, place, [*calls(op, "cpu", torch.bfloat16), real])
        kernels = {key: subject.kernels[key] for key in sorted(subject.calls[-1].kernels)}
        every = [(key, mutant) for key, kernel in kernels.items() for mutant in changed(kernel)]
        for key, mutant in draw.sample(every, min(len(every), count // len(ops))):
            noticed = subject.notices(key, mutant)
            total, dead = total + 1, dead + (noticed is not None)
            if noticed is None:
                print(f"alive  {mutant}", flush=True)
        print(f"{op.name}: {dead} of {total} dead so far", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
