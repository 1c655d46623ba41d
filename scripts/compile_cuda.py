"""Compile csrc/*.cu for every supported architecture, and print what each kernel takes of a multiprocessor.

Needs nvcc and any torch, a CPU-only one too: the sources use its stable ABI alone. Without nvcc it says so and
succeeds. It fails on a source that does not compile and on a kernel that spills registers to memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

CSRC = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = (80, 90, 100)
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v", "-c"]

# What ptxas -v says of one kernel, in three lines.
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'\n"
    r".*\n.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def demangle(names: list[str]) -> dict[str, str]:
    """Names as in the source, without namespaces and arguments; unchanged where there is no c++filt."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |\(.*", "", line) for line in lines.splitlines()]
    return dict(zip(names, short, strict=True))


def compile_source(nvcc: str, source: Path, output: Path) -> str:
    """What ptxas says of a source file's kernels, on all architectures."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, *FLAGS, *targets, f"-I{CSRC}", f"-I{include}", str(source), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def usages(log: str) -> dict[str, dict[int, Usage]]:
    """Kernel -> architecture -> usage."""
    found: dict[str, dict[int, Usage]] = defaultdict(dict)
    for entry in ENTRY.finditer(log):
        spilled = int(entry["stores"]) + int(entry["loads"])
        usage = Usage(int(entry["registers"]), spilled, int(entry["shared"] or 0))
        found[entry["name"]][int(entry["architecture"])] = usage
    names = demangle(list(found))
    return {names[name]: by_architecture for name, by_architecture in found.items()}


def table(kernels: dict[str, dict[int, Usage]]) -> str:
    """One line per kernel: registers on each architecture, bytes spilled and bytes of shared memory on the worst."""
    width = max(map(len, kernels))
    lines = [" ".join([f"{'registers, on sm_':{width}}", *(f"{a:>4}" for a in ARCHITECTURES), " spilled  shared"])]
    for name, by_architecture in sorted(kernels.items()):
        registers = [f"{by_architecture[a].registers:>4}" for a in ARCHITECTURES]
        spilled = max(usage.spilled for usage in by_architecture.values())
        shared = max(usage.shared for usage in by_architecture.values())
        lines.append(" ".join([f"{name:{width}}", *registers, f"{spilled:>8}", f"{shared:>7}"]))
    return "\n".join(lines)


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile_cuda: there is no nvcc on PATH or in CUDA_HOME: the CUDA sources were not compiled")
        return 0
    kernels: dict[str, dict[int, Usage]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for source in sorted(CSRC.glob("*.cu")):
            found = usages(compile_source(nvcc, source, Path(directory) / f"{source.stem}.o"))
            if not found or any(set(by_architecture) != set(ARCHITECTURES) for by_architecture in found.values()):
                raise SystemExit(f"{source.name}: ptxas did not report every kernel on every architecture")
            kernels |= found
    print(table(kernels))
    spilling = [name for name, by_architecture in kernels.items() if any(u.spilled for u in by_architecture.values())]
    for name in spilling:
        print(f"compile_cuda: {name} spills registers", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
