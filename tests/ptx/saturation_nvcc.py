"""The launches of a call of CUDA kernels on an H200: what `saturation.py` reports of them, from what nvcc compiled."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import runpy
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.emulation import backend as emulation
from tests.emulation import build
from tests.helpers import in_flight
from tests.ptx import counts, nvcc
from tests.ptx.compile import ROOT, cache
from vlmfast.benchmarks.predicted import Launch
from vlmfast.registry import Op

MOST_STEPS = 10_000_000  # of a batch of blocks: to choose from an image of 1296 tokens takes more than a million
LIMITED = re.compile(r"// Limited \((\w+)\): (.*(?:\n *// .*)*)")
# Multiprocessors and the most blocks of a launch: of a whole H200, and of the GPU that is emulated otherwise.
WHOLE, TINY = (132, ctypes.c_int64(2**31 - 1)), (1, ctypes.c_int64(5))
USAGE = re.compile(r"Function (\w+):\n\s*REG:(\d+) STACK:\d+ SHARED:(\d+)")


@dataclass(frozen=True)
class Facts:
    """What the machine code of a kernel says."""

    registers: int  # of a thread
    shared: int  # bytes of static shared memory, less those that the system reserves
    outstanding: int  # bytes that a thread has in flight


@functools.cache
def limits() -> dict[str, str]:
    """Map kernels that fall short to the reason, from a comment `// Limited (name): ...` beside their configuration."""
    texts = [path.read_text() for path in (*build.CSRC.glob("*/*.cu"), *build.CSRC.glob("*/*.cuh"))]
    found = [match for text in texts for match in LIMITED.finditer(text)]
    return {match[1]: re.sub(r"\s*\n\s*// ", " ", match[2]) for match in found}


def name_of(mangled: str) -> str:
    """Return the name of a kernel that a mangled name with its template arguments has."""
    for number, rest in re.findall(r"(?=(?<!\d)(\d+)([a-z]\w*))", mangled):
        if (name := rest[: int(number)]).endswith("_kernel"):
            return name
    return mangled


@functools.cache
def facts(family: str) -> dict[str, Facts]:
    """Map the unified names of a family's kernels to what their machine code for `nvcc.TARGET` says."""
    script = runpy.run_path(str(ROOT / "scripts" / "compile_cuda.py"))
    compiler = nvcc.find_nvcc()
    tool, environment = script["find_disassembler"](compiler)
    ptx = nvcc.compiled(build.CSRC / family / "cuda.cu")
    source = cache() / f"{family}.ptx"
    source.write_text(ptx)
    command = [compiler, "-cubin", f"-arch={nvcc.TARGET}", str(source)]
    cubin = build.compiled(command, [source], ".cubin", cache())
    said, code = (
        subprocess.check_output([tool, option, str(cubin)], env=environment, text=True)
        for option in ("-res-usage", "-sass")
    )
    pieces = re.split(r"^\s*Function : (\w+)$", code, flags=re.M)
    codes = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return {
        nvcc.unified(name): Facts(
            int(registers), max(0, int(shared) - in_flight.SHARED_OF_SYSTEM), in_flight.outstanding(codes[name])
        )
        for name, registers, shared in USAGE.findall(said)
    }


class Counting(nvcc.Family):
    """Runs the launches of a family as on an H200, and counts what they do."""

    def __init__(self, family: str) -> None:
        super().__init__(*nvcc.parts(family))
        self.facts, self.launches = facts(family), []

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        self.library.vlmfast_emulation_gpu(*WHOLE)
        try:
            with super().executing():
                yield
        finally:
            self.library.vlmfast_emulation_gpu(*TINY)

    def _execute(self, kernel: int, arguments: Any, count: int, shape: Any, shared: int) -> int:
        name = self.names[kernel]
        machine, before = self.machine(name), self.machine(name).ran.copy()
        machine.most_steps = MOST_STEPS
        if failed := super()._execute(kernel, arguments, count, shape, shared):
            return failed
        ran, known = machine.ran - before, self.facts[name]
        warps = -(-math.prod(shape[3:6]) // 32)
        room = in_flight.resident(known.registers, warps, known.shared + shared)
        each = warps * 32 * known.outstanding
        moved = counts.moved(machine, ran, sum(self.sizes()))
        self.launches.append(
            Launch(name_of(name), math.prod(shape[:3]), room, each, *moved, counts.issued(machine, ran))
        )
        return 0

    def sizes(self) -> Iterator[int]:
        """Yield the bytes of each tensor, or of each part of it, that the launcher allows its kernels to access."""
        found, number = (ctypes.c_int64 * 5)(), 0
        while self.library.vlmfast_emulation_region(ctypes.c_size_t(number), found):
            yield found[1] * found[2]
            number += 1


@functools.cache
def counting(family: str) -> Counting:
    """Compile a family, or find it compiled."""
    return Counting(family)


def launches_on(op: Op, args: tuple[Any, ...]) -> list[Launch]:
    """Run a call, and return its launches; none of a call that the CUDA kernels do not take."""
    family = counting(op.family)
    family.launches = []
    if emulation.loader(op.name, op.family, op.reference).unsupported(*args) is None:
        family(op.name, *args)
    return family.launches
