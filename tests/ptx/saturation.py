"""Check whether kernels can saturate the memory of an H200, by their bytes in flight and instructions per byte.

    TRITON_INTERPRET=1 python -m tests.ptx.saturation rms_norm_backward > saturation.json

A record for each op, real shape in bfloat16 and kernel, as launched on 132 multiprocessors:

* `in_flight`: bytes in flight per multiprocessor (`tests/helpers/in_flight.py`). `NEEDED` bytes are enough. So is an
  `at_once` of nearly 1, the share of all bytes that the kernel loads which is in flight: more there is not.
* `instructions`: instructions of all threads, as the machine counts them, per byte of the op (`Cases.bytes`), without
  moves between registers, which disappear in machine code.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any
from unittest import mock

import torch

import vlmfast
from tests.helpers import in_flight, interpreter, traffic
from tests.helpers.cases import PRIMITIVE
from tests.ptx import backend
from tests.ptx.compile import Compiled, compiled
from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction
from vlmfast import backends
from vlmfast.registry import Op

PLACE = "ptx_sm_90"
MOST_INSTRUCTIONS = 4.0  # per byte; an H200 can issue about 6, less stalls
ENOUGH_AT_ONCE = 0.9
MOST_BYTES = 48 << 20  # of a call: larger ones take minutes here and give the same picture
BOUND_BY_MEMORY = [op for op in traffic.BOUND_BY_MEMORY if op in PRIMITIVE]


def moves(ins: Instruction, kind: str) -> int:
    """Return the bytes that one thread loads from ("ld") or stores to ("st") global memory by an instruction."""
    if kind == "ld" and ins.name == "cp" and "global" in ins.flags and len(ins.args) > 2:
        return int(ins.args[2], 0)
    if ins.name != kind or "global" not in ins.flags:
        return 0
    count = next((int(flag[1:]) for flag in ins.flags if flag in ("v2", "v4", "v8")), 1)
    return count * ins.types[-1].size


def limits() -> dict[str, str]:
    """Map kernels that fall short to the reason, from the ``limited`` attribute beside their config."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("vlmfast.kernels.")]
    functions = [getattr(value, "fn", None) for module in modules for value in vars(module).values()]
    return {f.__name__: f.limited for f in functions if isinstance(f, FunctionType) and hasattr(f, "limited")}


def records(op: Op, most_bytes: int = MOST_BYTES) -> list[dict[str, Any]]:
    """Run the real shapes of an op, and make a record of each launch."""
    found, run = [], op.backend(PLACE).run
    torch.manual_seed(0)
    for label, args in op.cases.workloads("cpu", torch.bfloat16):
        moved = op.cases.bytes(*args)
        if not traffic.ENOUGH <= moved <= most_bytes:  # smaller calls are too short to saturate the memory
            continue
        launches: list[dict[str, Any]] = []
        with ExitStack() as stack:
            stack.enter_context(vlmfast.use(PLACE))
            stack.enter_context(mock.patch.object(backend, "compiled", functools.partial(compiled, code=True)))
            stack.enter_context(mock.patch.object(backend, "launch", _noting(backend.launch, launches)))
            stack.enter_context(backend.multiprocessors(op, in_flight.MULTIPROCESSORS))
            run(*args)
        for launch in launches:
            launch["instructions"] = round(launch["instructions"] / moved, 2)
            found.append({"op": op.name, "workload": label, **launch})
    return found


def _noting(launch: Callable[..., None], launches: list[dict[str, Any]]) -> Callable[..., None]:
    def noted(found: Compiled, name: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        machine = backend.machine_for(found.ptx, name)
        before = machine.ran.copy()
        launch(found, name, arguments, grid)
        ran = machine.ran - before
        counted = sum(int(n) for ins, n in zip(machine.kernel.instructions, ran, strict=True) if ins.name != "mov")
        programs = grid[0] * grid[1] * grid[2]
        under_way = _in_flight(machine, found, programs)
        at_once = min(1.0, under_way * in_flight.MULTIPROCESSORS / max(_read(machine, ran, arguments), 1))
        told = {"kernel": name, "programs": programs, "in_flight": under_way, "at_once": round(at_once, 2)}
        reason = {"limited": limits()[name]} if name in limits() else {}
        launches.append({**told, "instructions": counted, **reason})

    return noted


def _read(machine: Machine, ran: Any, arguments: dict[str, Any]) -> int:
    """Return the bytes of rows that a launch reads: those of its widest loads, up to a limit.

    The limit, the bytes of all tensors less those that are stored, counts bytes once that are loaded repeatedly.
    """
    moved = [(ins, int(number)) for ins, number in zip(machine.kernel.instructions, ran, strict=True)]
    stores = sum(moves(ins, "st") * number for ins, number in moved)
    sizes = [(moves(ins, "ld"), number) for ins, number in moved]
    widest = max(size for size, _ in sizes)
    loads = sum(size * number for size, number in sizes if size == widest)
    return min(loads, sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor)) - stores)


def _in_flight(machine: Machine, found: Compiled, programs: int) -> int:
    warps = machine.kernel.threads[0] // 32
    return in_flight.in_flight(found.code, found.registers, warps, found.shared, programs)


def falls_short(record: dict[str, Any]) -> bool:
    """Tell whether a kernel has too few bytes in flight, and not nearly all of them, or too many instructions."""
    idle = record["in_flight"] < in_flight.NEEDED and record["at_once"] < ENOUGH_AT_ONCE
    return idle or record["instructions"] > MOST_INSTRUCTIONS


def main(names: list[str]) -> None:
    interpreter.repair()
    backends.LOADERS |= backend.LOADERS
    ops = [op for op in BOUND_BY_MEMORY if not names or op.name in names]
    json.dump([record for op in ops for record in records(op)], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
