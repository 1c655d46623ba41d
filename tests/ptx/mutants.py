"""Mutation tests: change one instruction of a kernel, and see whether a test of the op's samples fails.

    TRITON_INTERPRET=1 python -m tests.ptx.mutants 12 merge_rows rms_norm

draws that many changes for each of the ops, or of all ops if none is named, and prints the survivors. They are drawn
from the kernels that a real shape runs; for ops that are bound by compute, whose real shapes take minutes, from those
of the samples. A change is killed if a call, of the real shape or of the generated tests, does what no kernel
may do or gives a wrong result. An op's changes are the same in each run.
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
from unittest import mock

import torch

import vlmfast
from tests.helpers import interpreter, traffic
from tests.helpers.cases import AWKWARD, PRIMITIVE, calls, is_float, is_tensor, outputs, widened
from tests.helpers.rounding import assert_within
from tests.ptx import backend
from tests.ptx.gram import gram
from tests.ptx.known_bits import KnownBits, registers
from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction, Kernel
from tests.ptx.survivors import explain
from vlmfast import backends
from vlmfast.registry import Op

FEW = 2  # multiprocessors, as in the interpreter, so that persistent loops take several rounds
STEPS = 300_000  # no call takes more; a mutant that does counts as endless
NOTHING = Instruction("fence", (), (), [], text="nothing")
# Operation or comparison -> the one that replaces it.
OTHERS = {"add": "sub", "sub": "add", "max": "min", "min": "max", "and": "or", "or": "and", "shl": "shr", "mul": "add"}
OTHERS |= {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "bfly": "up", "up": "down"}


@dataclass(frozen=True)
class Mutant:
    """One instruction of a kernel and its replacement."""

    kernel: str
    at: int
    was: Instruction
    changed: Instruction
    excuse: str = ""  # why the change may not be a fault

    def __str__(self) -> str:
        return f"{self.kernel} {self.at}: {self.was.text}  ->  {self.changed.text}  ({self.was.line})"

    def of(self, kernel: Kernel) -> Machine:
        instructions = [*kernel.instructions[: self.at], self.changed, *kernel.instructions[self.at + 1 :]]
        machine = Machine(replace(kernel, instructions=instructions))
        machine.most_steps = STEPS
        return machine

    def beside(self, kernel: Kernel) -> Machine:
        """Return a machine of the unchanged kernel; ``differed`` becomes true if the change gives other numbers."""
        machine = Machine(kernel)
        step, other = machine.program[self.at], machine._step(self.at, self.changed)
        written = [machine.index[name] for name in registers(kernel, self.was)]
        machine.differed = not written  # assumed for instructions that write no register, such as stores

        def run() -> None:
            before = list(machine.values)
            other.action()
            found = [machine.values[index] for index in written]
            machine.values = before
            step.action()
            machine.differed |= any(
                (value != machine.values[index]).any() for value, index in zip(found, written, strict=True)
            )

        machine.program[self.at] = replace(step, action=run)
        return machine


def synchronises(ins: Instruction) -> bool:
    """Tell whether an instruction only orders others: a barrier, a wait or a commit.

    Barriers of a warp are left out: the machine keeps its lanes in lockstep.
    """
    if ins.name in ("bar", "barrier"):
        return "warp" not in ins.flags
    return ins.name in ("cp", "wgmma") and bool({"commit_group", "wait_group", "wait_all"} & set(ins.flags))


def dropped(kernel: Kernel) -> list[Mutant]:
    """Make the mutants of a kernel without one of its barriers, waits and commits."""
    found = [(at, ins) for at, ins in enumerate(kernel.instructions) if synchronises(ins)]
    excuses = {}
    for (first, ins), (second, other) in pairwise((at, ins) for at, ins in found if ins.name == "cp"):
        if ins.text == other.text and "commit_group" in ins.flags:
            excuses[first] = "its copies join the next group, which is waited for no later"
        elif ins.text == other.text:
            excuses[second] = "as many groups have been waited for, and none was committed since"
            if second == first + 1:
                excuses[first] = "the next instruction waits for as many groups"
    return [Mutant(kernel.name, at, ins, NOTHING, excuses.get(at, "")) for at, ins in found]


def changed(kernel: Kernel) -> list[Mutant]:
    """Make mutants of a kernel with another operation, a number that is one larger, or no store or copy.

    Changes that `KnownBits` proves to have no effect are left out.
    """
    known = KnownBits(kernel)
    floats = {arg for ins in kernel.instructions for arg in ins.args if any(kind.name == "f32" for kind in ins.types)}
    every = [(at, ins, other) for at, ins in enumerate(kernel.instructions) for other in _changes(ins, floats)]
    return [Mutant(kernel.name, *one) for one in every if not known.same(*one[1:])]


def _changes(ins: Instruction, floats: set[str]) -> Iterator[Instruction]:
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
            other = "max" if ins.name == "redux" and flag == "add" else OTHERS[flag]
            yield _with(ins, flags=(*ins.flags[:place], other, *ins.flags[place + 1 :]))
    for place, arg in enumerate(ins.args):
        if re.fullmatch(r"\d+", arg) and ins.name != "shfl":
            larger = "0f3F800000" if arg == "0" and ins.args[0] in floats else str(int(arg) + 1)
            yield _with(ins, args=[*ins.args[:place], larger, *ins.args[place + 1 :]])


def _with(ins: Instruction, **changes: Any) -> Instruction:
    other = replace(ins, **changes)
    return replace(other, text=f"{other.opcode} {', '.join(other.args)}")


@dataclass
class Call:
    """A call of an op, its expected result, and the kernels that it runs."""

    op: Op
    args: tuple[Any, ...]
    multiprocessors: int
    bytes: list[tuple[torch.Tensor, torch.Tensor]]  # its tensors as bytes, each with a copy
    defined: tuple[torch.Tensor, ...]
    exact: tuple[torch.Tensor, ...]
    kernels: dict[tuple[str, str], int] = field(default_factory=dict)  # and how many instructions of each


class Subject:
    """Calls of some ops on one backend and the kernels that they run; with unchanged kernels, each call passes."""

    def __init__(self, place: str, every_call: Iterable[tuple[Op, tuple[Any, ...], int]]) -> None:
        self.place, self.calls, self.refused = place, [], dict[str, str]()
        backend.forget()
        with mock.patch("tests.ptx.machine.MOST_STEPS", STEPS):
            self._run(every_call)
        self.kernels = {key: machine.kernel for key, machine in backend.machines.items()}

    def _run(self, every_call: Iterable[tuple[Op, tuple[Any, ...], int]]) -> None:
        for op, args, count in every_call:
            if reason := op.backend(self.place).unsupported(*args):
                self.refused[op.name] = reason
                continue
            every = [torch.empty(0, dtype=torch.uint8).set_(a.untyped_storage()) for a in args if is_tensor(a)]
            copied = [(one, one.clone()) for one in every]
            call = Call(op, args, count, copied, outputs(op.reference(*args)), outputs(op.reference(*widened(args))))
            already = {key: int(machine.ran.sum()) for key, machine in backend.machines.items()}
            self.check(call)
            ran = {key: int(machine.ran.sum()) for key, machine in backend.machines.items()}
            call.kernels = {k: count - already.get(k, 0) for k, count in ran.items() if count > already.get(k, 0)}
            self.calls.append(call)

    def check(self, call: Call) -> None:
        """Run a call and check what the generated tests check."""
        try:
            with vlmfast.use(self.place), backend.multiprocessors(call.op, call.multiprocessors):
                got = outputs(call.op.backend(self.place).run(*call.args))
            assert_within(got, call.defined, call.exact)
            if call.op.exact:
                assert all(torch.equal(g, want) for g, want in zip(got, call.defined, strict=True))
            assert all(torch.equal(now, before) for now, before in call.bytes), "an input was written to"
        finally:
            for now, before in call.bytes:
                now.copy_(before)

    def fate(self, key: tuple[str, str], mutant: Mutant) -> str:
        """Say whether a survivor ran and gave other numbers: "never ran", "same" or "hidden"."""
        if not backend.machines[key].ran[mutant.at]:
            return "never ran"
        machine = mutant.beside(self.kernels[key])
        with self._in_place(key, machine):
            for call in (call for call in self.calls if key in call.kernels):
                self.check(call)
                if machine.differed:
                    return "hidden"
        return "same"

    def notices(self, key: tuple[str, str], mutant: Mutant) -> str | None:
        """Return the error by which a change was noticed, or None."""
        calls_of_kernel = [call for call in self.calls if key in call.kernels]
        with self._in_place(key, mutant.of(self.kernels[key])):
            for call in sorted(calls_of_kernel, key=lambda call: call.kernels[key]):  # most are killed by a short one
                try:
                    self.check(call)
                except Exception as error:  # any error kills the mutant
                    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    @contextlib.contextmanager
    def _in_place(self, key: tuple[str, str], machine: Machine) -> Iterator[None]:
        original = backend.machines[key]
        backend.machines[key] = machine
        try:
            yield
        finally:
            backend.machines[key] = original


def survivors_of_drops(op: Op, place: str, dtype: torch.dtype) -> list[Mutant]:
    """Return the barriers, waits and commits that can be dropped unnoticed in every specialisation of their kernel."""
    torch.manual_seed(0)
    subject, dead = Subject(place, ((op, args, FEW) for args in calls(op, "cpu", dtype))), {}
    for key, kernel in subject.kernels.items():
        numbers: Counter[tuple[str, ...]] = Counter()
        for mutant in dropped(kernel):
            where = mutant.kernel, mutant.was.line, mutant.was.opcode
            numbers[where] += 1  # several on one line are distinguished by their order
            this = *where, numbers[where]
            if dead.get(this) is not True:
                dead[this] = subject.notices(key, mutant) is not None or mutant
    return [found for found in dead.values() if found is not True]


def of_family(ops: list[Op], place: str) -> Subject:
    """Return the samples of some ops, in every layout, and a real shape of each op that is bound by memory.

    Samples have the dtype of the real shape, so that they run the same kernels. Of the greedy selections that begin
    with Gram matrices there are samples of these as well.
    """

    def every_call() -> Iterator[tuple[Op, tuple[Any, ...], int]]:
        for op in ops:
            torch.manual_seed(0)
            real = traffic.workload(op)[1]
            dtype = next((arg.dtype for arg in real if is_float(arg)), torch.bfloat16)
            yield from ((op, args, FEW) for args in calls(op, "cpu", dtype))
            if op in traffic.BOUND_BY_MEMORY:
                yield op, real, backend.MULTIPROCESSORS
            if op.name in ("farthest", "dpp_map"):
                yield from ((gram(), args, FEW) for args in calls(gram(), "cpu", dtype, range(len(AWKWARD))))

    return Subject(place, every_call())


def main(count: int, names: list[str], place: str = "ptx_sm_90") -> None:
    interpreter.repair()
    backends.LOADERS |= backend.LOADERS
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if unknown := set(names) - {op.name for op in PRIMITIVE}:
        sys.exit(f"not ops with kernels of their own: {', '.join(sorted(unknown))}")
    ops = [op for op in PRIMITIVE if not names or op.name in names]
    for family in dict.fromkeys(op.family for op in ops):
        ops_of_family = [op for op in ops if op.family == family]
        subject = of_family(ops_of_family, place)
        for op in ops_of_family:
            own = [call.kernels for call in subject.calls if call.op is op]
            if not own:
                print(f"{op.name}: no call runs on {place}: {subject.refused.get(op.name, 'it has no samples')}")
                continue
            kernels = own[-1] if op in traffic.BOUND_BY_MEMORY else set().union(*own)
            every = [(key, one) for key in sorted(kernels) for one in changed(subject.kernels[key])]
            fates = Counter[str]()
            for key, mutant in random.Random(op.name).sample(every, min(len(every), count)):
                fate = "dead"
                if subject.notices(key, mutant) is None:
                    fate = subject.fate(key, mutant)
                    why = explain(mutant.kernel, mutant.was, mutant.changed, fate)
                    print(f"{fate}  {mutant}\n    {why or 'not explained'}", flush=True)
                    fate += "" if why else ", not explained"
                fates[fate] += 1
            print(f"{op.name}: {dict(fates)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
