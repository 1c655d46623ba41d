"""Compile csrc/*/*.cu for the given architectures, and print the registers and shared memory of each kernel.

    python scripts/compile_cuda.py [--bfloat16-alone] [sm_90 ...]     (default: every supported architecture)

Needs nvcc and any torch, even a CPU-only one, because the sources use only its stable ABI. nvcc looks for errors in
host code too, but makes none of it, which is half of the time. Without nvcc the script prints that and succeeds. It
fails if a source does not compile, if a kernel has a stack, or if a kernel that is made for vectors of 16 bytes loads
none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmfast.architectures import CUDA as ARCHITECTURES
from vlmfast.architectures import NVCC_FLAGS

CSRC = Path(__file__).parents[1] / "csrc"

# The three lines that `ptxas -v` prints about one kernel.
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'\n"
    r".*\n.*?(?P<stack>\d+) bytes stack frame, .*\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)

# Lines of the disassembly: the architecture and the kernel of the code that follows, and global loads and stores.
ASSEMBLY = re.compile(r"arch = sm_(\d+)|Function : (\w+)|\b(LDG|LDGSTS|STG)\.([\w.]+)")
# Names of kernels that are made for vectors: the dtype, and the number of elements in a vector.
VECTORS = re.compile(r"kernel<(?:TensorTiles<)?(?P<dtype>[\w ]+), (?:\d+, (?=\d+>)|(?:Row|Head)Policy<)?(?P<count>\d+)")
SIZES = {"float": 4, "__half": 2, "__nv_bfloat16": 2, "unsigned short": 2}


@dataclass(frozen=True)
class Usage:
    """Registers, memory and accesses of one kernel on one architecture."""

    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers, and arrays or arguments whose place is chosen while it runs
    shared: int  # bytes
    loads: tuple[int, ...] = ()  # widths in bytes of its loads from global memory
    stores: tuple[int, ...] = ()


def find_nvcc() -> str | None:
    """Find nvcc in CUDA_HOME if that is set, otherwise on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def find_disassembler(nvcc: str) -> tuple[str, dict[str, str]] | None:
    """Find cuobjdump, nvcc's or Triton's, and the environment in which it finds nvdisasm."""
    folders = [Path(nvcc).resolve().parent]
    if triton := importlib.util.find_spec("triton"):
        folders += [Path(folder) / "backends" / "nvidia" / "bin" for folder in triton.submodule_search_locations or ()]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path) if shutil.which("nvdisasm", path=path) else None
    return (found, {**os.environ, "PATH": path}) if found else None


def demangle(names: list[str]) -> dict[str, str]:
    """Map mangled names to names without namespaces and arguments; to themselves if there is no c++filt."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|\b\w+::|^void |\(.*", "", line) for line in lines.splitlines()]
    return dict(zip(names, short, strict=True))


def widths(disassembly: str) -> dict[tuple[str, int, str], set[int]]:
    """Map (mangled kernel, architecture, "LDG" or "STG") to the widths in bytes of its global accesses."""
    found: dict[tuple[str, int, str], set[int]] = defaultdict(set)
    architecture, kernel = 0, ""
    for number, name, instruction, modifiers in ASSEMBLY.findall(disassembly):
        if number:
            architecture = int(number)
        elif name:
            kernel = name
        else:
            bits = max((int(b) for b in re.findall(r"\b[US]?(256|128|64|16|8)\b", modifiers)), default=32)
            found[kernel, architecture, "STG" if instruction == "STG" else "LDG"].add(bits // 8)
    return found


def usages(log: str, disassembly: str = "") -> dict[str, dict[int, Usage]]:
    """Map kernel -> architecture -> usage, from the output of ptxas and cuobjdump."""
    found: dict[str, dict[int, Usage]] = defaultdict(dict)
    accesses = widths(disassembly)
    for entry in ENTRY.finditer(log):
        name, architecture = entry["name"], int(entry["architecture"])
        loads, stores = (tuple(sorted(accesses.get((name, architecture, kind), ()))) for kind in ("LDG", "STG"))
        numbers = (int(entry[kind] or 0) for kind in ("registers", "stack", "shared"))
        found[name][architecture] = Usage(*numbers, loads, stores)
    names = demangle(list(found))
    return {names[name]: by_architecture for name, by_architecture in found.items()}


def table(kernels: dict[str, dict[int, Usage]], architectures: Sequence[int]) -> str:
    """Make a table: registers on each architecture, and the most bytes of stack and of shared memory on any."""
    width = max(map(len, kernels))
    lines = [" ".join([f"{'registers, on sm_':{width}}", *(f"{a:>4}" for a in architectures), "   stack  shared"])]
    for name, by_architecture in sorted(kernels.items()):
        registers = [f"{by_architecture[a].registers:>4}" for a in architectures]
        stack = max(usage.stack for usage in by_architecture.values())
        shared = max(usage.shared for usage in by_architecture.values())
        lines.append(" ".join([f"{name:{width}}", *registers, f"{stack:>8}", f"{shared:>7}"]))
    return "\n".join(lines)


def in_vectors(name: str) -> bool:
    """Tell whether a kernel is made for rows in vectors of 16 bytes."""
    made_for = VECTORS.search(name)
    return made_for is not None and SIZES.get(made_for["dtype"], 0) * int(made_for["count"]) == 16


def faults(kernels: dict[str, dict[int, Usage]]) -> list[str]:
    """List kernels with a stack, which is slow memory, and kernels for vectors of 16 bytes that load none."""
    found = []
    for name, by_architecture in kernels.items():
        for architecture, usage in by_architecture.items():
            if usage.stack:
                found.append(f"{name} has a stack of {usage.stack} bytes on sm_{architecture}")
            if in_vectors(name) and usage.loads and max(usage.loads) < 16:
                found.append(f"{name} loads no 16 bytes at a time on sm_{architecture}")
    return found


def compile_all(
    nvcc: str, architectures: Sequence[int] = ARCHITECTURES, bfloat16_alone: bool = False
) -> dict[str, dict[int, Usage]]:
    """Compile all kernels of csrc/, or those for bfloat16, and read their usage from ptxas and the disassembly.

    Raises:
        SystemExit: if a source does not compile, or the output lacks a kernel.
    """
    disassembler = find_disassembler(nvcc)
    if disassembler is None:
        print("compile_cuda: there is no cuobjdump beside nvcc or in Triton: widths of accesses are not looked at")

    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    includes = [f"-I{CSRC}", f"-I{Path(torch.__file__).parent / 'include'}"]
    types = ["-DVLMFAST_BFLOAT16_ALONE"] if bfloat16_alone else []
    nvcc_command = [nvcc, *NVCC_FLAGS, *types, "-Xptxas", "-v", "-fatbin", *targets, *includes]

    def compile_one(source: Path) -> dict[str, dict[int, Usage]]:
        with tempfile.TemporaryDirectory() as directory:
            output, disassembly = str(Path(directory) / f"{source.stem}.fatbin"), ""
            result = subprocess.run([*nvcc_command, str(source), "-o", output], capture_output=True, text=True)
            log = result.stdout + result.stderr
            if result.returncode != 0:
                raise SystemExit(f"{source.name} does not compile:\n{log}")
            if disassembler is not None:
                command, environment = [disassembler[0], "-sass", output], disassembler[1]
                disassembly = subprocess.check_output(command, env=environment, text=True)
        found = usages(log, disassembly)
        if not found or any(set(by_architecture) != set(architectures) for by_architecture in found.values()):
            raise SystemExit(f"{source.name}: ptxas did not report every kernel on every architecture")
        if disassembler is not None and not all(u.loads for kernel in found.values() for u in kernel.values()):
            raise SystemExit(f"{source.name}: no loads in the disassembly of some kernel")
        return found

    with ThreadPoolExecutor(2) as pool:  # the largest source first, since it takes longest
        found = pool.map(compile_one, sorted(CSRC.glob("*/*.cu"), key=lambda path: -path.stat().st_size))
        return {name: by_architecture for of_source in found for name, by_architecture in of_source.items()}


def main(arguments: Sequence[str]) -> int:
    known = {f"sm_{number}": number for number in ARCHITECTURES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bfloat16-alone", action="store_true", help="leave out kernels for other types")
    parser.add_argument("architectures", nargs="*", metavar="sm_90", help=f"of {', '.join(known)}; default: all")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.architectures if name not in known]:
        parser.error(f"architectures are {', '.join(known)}, got {', '.join(unknown)}")
    architectures = [known[name] for name in given.architectures] or ARCHITECTURES
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile_cuda: there is no nvcc on PATH or in CUDA_HOME: the CUDA sources were not compiled")
        return 0
    kernels = compile_all(nvcc, architectures, given.bfloat16_alone)
    print(table(kernels, architectures))
    wrong = faults(kernels)
    for fault in wrong:
        print(f"compile_cuda: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
