"""Count how many instructions of each kernel the generated tests run; an instruction that never runs is untested.

    TRITON_INTERPRET=1 python -m tests.ptx.coverage > coverage.json
    TRITON_INTERPRET=1 python -m tests.ptx.coverage --missing top_tokens

The first command writes a record for each op and kernel; the second prints which instructions of some ops never ran.
An instruction has run if it did for at least one thread; one whose predicate was never true has not. What runs only
when an assertion fails is not counted: no valid call reaches it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

import vlmfast
from tests.helpers import interpreter
from tests.helpers.cases import DTYPES, PRIMITIVE, calls
from tests.ptx import backend
from tests.ptx.parse import Instruction, Kernel
from vlmfast import backends
from vlmfast.registry import Op

PLACE = "ptx_sm_90"


def execute(op: Op, dtype: torch.dtype) -> None:
    """Run the samples in all layouts, of which `make test-ptx` has a part; `backend.machines` records what ran."""
    found = op.backend(PLACE)
    torch.manual_seed(0)
    with vlmfast.use(PLACE):
        for args in calls(op, "cpu", dtype):
            if found.unsupported(*args) is None:
                found.run(*args)


def of_assertions(kernel: Kernel) -> set[int]:
    """Return the places of the instructions that run only when an assertion fails: blocks that end with a trap."""
    found, starts = set(), set(kernel.labels.values())
    for at, ins in enumerate(kernel.instructions):
        if at in starts or kernel.instructions[at - 1].name in ("bra", "ret", "trap"):
            first = at
        if ins.name == "trap":
            found |= set(range(first, at + 1))
    return found


def counted() -> Iterator[tuple[str, Instruction, bool]]:
    """Yield the kernel of each counted instruction of each specialisation, the instruction, and whether it ran."""
    for (_, name), machine in backend.machines.items():
        never = of_assertions(machine.kernel)
        for at, (ins, ran) in enumerate(zip(machine.kernel.instructions, machine.ran, strict=True)):
            if at not in never:
                yield name, ins, ran > 0


def never_ran() -> list[tuple[str, Instruction]]:
    """List the instructions that have not run; instructions with equal text and line count once."""
    found = {}
    for name, ins, ran in counted():
        if not ran:
            found.setdefault((name, ins.line, ins.opcode), ins)
    return [(name, ins) for (name, _, _), ins in found.items()]


def records(op: Op) -> list[dict[str, Any]]:
    """Count, over all specialisations of each kernel, the instructions and those that ran."""
    backend.forget()
    for dtype in DTYPES:
        execute(op, dtype)
    count: dict[str, Counter[str]] = {}
    for _, name in backend.machines:
        count.setdefault(name, Counter()).update(specialisations=1)
    for name, _, ran in counted():
        count[name].update(instructions=1, ran=int(ran))
    place = {"target": backend.PLACES[PLACE]}
    return [{"op": op.name, "kernel": name, **place, **numbers} for name, numbers in count.items()]


def main(arguments: list[str]) -> None:
    interpreter.repair()
    backends.LOADERS |= backend.LOADERS
    names = [argument for argument in arguments if not argument.startswith("-")]
    ops = [op for op in PRIMITIVE if not names or op.name in names]
    if "--missing" in arguments:
        for op in ops:
            for record in records(op):
                print(record)
            for name, ins in never_ran():
                print(f"{name}  {ins.line}  {'@' + ins.predicate + ' ' if ins.predicate else ''}{ins.text}")
    else:
        json.dump([record for op in ops for record in records(op)], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
