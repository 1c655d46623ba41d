"""Compile every Triton launch of every op for GPUs that this machine does not have, and count their registers.

    python tests/helpers/compile_kernels.py [--real | --workloads] sm_90 gfx942 rms_norm > static.json

Launches of workloads in bfloat16 are compiled for every target; those of workloads in float32 and of samples in
bfloat16 for one target each; those of samples in float32 for none. With ``--workloads`` only the first of these are
compiled, and with ``--real`` workloads in both types for every target. Named ops are compiled alone; a kernel that an
op before them launches alike belongs to that.

The output is a list with one record per kernel, target and specialisation: registers, spills, shared memory, the widths
of its global accesses in bytes, the dtypes of the tiles that it multiplies, whether it does so on tensor cores, and
whether a workload of the op launches it ("real"). The rows of all workloads are multiples of 16 bytes.

This is a script of its own because nothing is compiled in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import vlmfast  # noqa: F401  (registers the ops)
from tests.helpers.specialisation import TARGETS, source_of
from tests.ptx.compile import OPTIONS
from vlmfast.architectures import GPUS
from vlmfast.benchmarks.candidates import CANDIDATES
from vlmfast.registry import OPS, Op

MULTIPROCESSORS = (16, 48, 108, 132)  # launches may depend on their number; MIG slices have few
AMD_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
TENSOR_CORES = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma")
DOT = re.compile(r"tt\.dot .*?: tensor<[\dx]+x(\w+)>")  # captures the dtype of the operands
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def calls_of(op: Op) -> list[tuple[bool, torch.dtype, int, list]]:
    """Return (real, dtype, multiprocessors, arguments) of the op's workloads and samples, with tensors on "meta".

    The arguments are first made on the CPU, because some shapes depend on how many positions of a mask are true.
    Samples take no time to make, and are made again for each number of multiprocessors.
    """

    def on_meta(args: tuple) -> list:
        return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]

    dtypes = (torch.float32, torch.bfloat16)
    workloads = [(dtype, on_meta(args)) for dtype in dtypes for _, args in op.cases.workloads("cpu", dtype)]
    calls = [(True, dtype, count, args) for count in MULTIPROCESSORS for dtype, args in workloads]
    for count, dtype in itertools.product(MULTIPROCESSORS, dtypes):
        calls += [(False, dtype, count, on_meta(args)) for args in op.cases.samples("cpu", dtype)]
    return calls


def launches(
    op: Op, calls: list[tuple[bool, torch.dtype, int, list]], target: str
) -> list[tuple[JITFunction, dict, dict, bool, torch.dtype]]:
    """Return (kernel, arguments, options, real, dtype) of every launch of the calls, without executing any."""
    seen, launched, backend = [], [], op.backend("triton")
    module = sys.modules[backend.run.__module__]
    module.device_unsupported = lambda x: None  # let the launcher treat the meta device as a GPU
    module.shared_memory = lambda x: GPUS[target]

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        launched.append((kernel, dict(inspect.signature(kernel.fn).bind(*args, **kwargs).arguments), options))

    original, JITFunction.run = JITFunction.run, record
    try:
        for real, dtype, multiprocessors, args in calls:
            module.processors = lambda x, count=multiprocessors: count
            if backend.unsupported(*args) is None:
                launched.clear()
                backend.run(*args)
                seen += [(*launch, real, dtype) for launch in launched]
    finally:
        JITFunction.run = original
    return seen


def measure(kernel: JITFunction, source: ASTSource, options: dict, name: str) -> dict:
    """Compile one specialisation for one target, and return its record."""
    compiled = triton.compile(source, target=TARGETS[name], options=options)
    assembly = compiled.asm
    if name.startswith("gfx"):
        text = assembly["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        found = re.findall(r"(?:buffer|global)_(load|store)_([a-z]+?)(?:x(\d))?(?:_\w+)?\b", text)
        accesses = [(kind == "load", AMD_BYTES[unit] * int(count or 1)) for kind, unit, count in found]
    else:
        text = assembly["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(assembly["cubin"])
            file.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        spills = int(re.search(r"STACK:(\d+)", usage)[1])  # bytes; a Triton kernel uses the stack for spills only
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        found = re.findall(r"(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", text)
        accesses = [(kind == "ld", int(count or 1) * int(bits) // 8) for kind, count, bits in found]
        copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;\n]*?0x(\w+)", text)
        accesses += [(True, int(size, 16)) for size in copies]
    constants = {p.name: source.constants[(i,)] for i, p in enumerate(kernel.params) if (i,) in source.constants}
    return {
        "kernel": kernel.__name__,
        "target": name,
        "types": sorted({t for t in source.signature.values() if t.startswith("*")}),
        "constants": constants,
        "options": options,
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "loads": sorted({size for load, size in accesses if load}),
        "stores": sorted({size for load, size in accesses if not load}),
        "multiplied": sorted(set(DOT.findall(assembly["ttir"]))),
        "tensor_cores": TENSOR_CORES.search(text) is not None,
    }


def is_compiled(
    given: list[str], target: str, real: bool, dtype: torch.dtype, kernel: JITFunction, source: ASTSource
) -> bool:
    """Tell whether a specialisation is compiled for this target with the given options."""
    if real and (dtype == torch.bfloat16 or "--real" in given):
        return True
    if {"--real", "--workloads"} & {*given} or (dtype == torch.float32 and not real):
        return False
    names = sorted(TARGETS)
    text = f"{kernel.__name__} {source.signature} {source.constants}"
    return names[zlib.crc32(text.encode()) % len(names)] == target


def main(given: list[str]) -> None:
    ops = {op.name: op for op in [*OPS.values(), *CANDIDATES.values()]}
    if unknown := {*given} - {*TARGETS, *ops, "--real", "--workloads"}:
        sys.exit(f"give names of ops, targets ({', '.join(TARGETS)}), --real or --workloads; got {', '.join(unknown)}")
    targets = [argument for argument in given if argument in TARGETS] or list(TARGETS)
    named = {*given} & {*ops} or {*ops}
    torch.manual_seed(0)  # gives the same specialisations in every run, so that Triton's cache has them
    records, done = [], set()
    for op in ops.values():
        if op.compose is not None or op.backend("triton").absent:
            continue
        calls = calls_of(op)
        on_each = ([(target, *launch) for launch in launches(op, calls, target)] for target in targets)
        for target, kernel, arguments, options, real, dtype in itertools.chain(*zip(*on_each, strict=True)):
            source = source_of(kernel, arguments, target)
            facts = source.signature, source.constants, source.attrs, options
            key = (target, kernel.__name__, *map(str, facts))
            if key in done or not is_compiled(given, target, real, dtype, kernel, source):
                continue
            done.add(key)
            if op.name in named:
                records.append({"op": op.name, "real": real, **measure(kernel, source, options, target)})
    json.dump(records, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
