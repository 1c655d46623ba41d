"""Write benchmarks/results/static.json: facts about every kernel that need no GPU.

    python scripts/static_report.py [traffic] [executed] [saturation] [predicted] [triton] [cuda]
    python scripts/static_report.py saturation:silu_mul,merge_rows executed:coverage

The first regenerates the named sections, or all of them; the second the records of some ops in these sections, and
keeps those of the others. `traffic` and `cuda`, whose kernels belong to several ops, are regenerated as a whole:

* `triton` and `cuda`: registers, spills or stack, shared memory and widths of global accesses in the generated code. A
  record stands for all specialisations of a kernel with the same dtypes: the largest numbers, and all widths. Triton's
  kernels are compiled at the shapes of the ops' workloads; of CUDA's, which need nvcc, all instantiations in csrc/ are.
* `traffic`: how many bytes each op moves, and how many it must: see tests/helpers/traffic.py.
* `executed`: how many instructions of the compiled kernels the generated tests run: see tests/ptx/coverage.py.
* `saturation`: whether the kernels can saturate the memory of an H200; and `predicted`: upper bounds of what they reach
  of a copy on each GPU. Both come from one run, and are regenerated together: see tests/ptx/saturation.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import compile_cuda

from vlmfast.registry import OPS

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks" / "results" / "static.json"
MOST_BYTES = 250_000
TOGETHER = {"saturation", "predicted"}
BY_OP = {*TOGETHER, "executed", "triton"}  # sections of which the records of some ops can be regenerated


def run(*command: str, interpret: bool) -> Any:
    """Run a script of the tests, with or without Triton's interpreter, and return the JSON that it writes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    python = [sys.executable, *command]
    return json.loads(subprocess.run(python, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


def summarised(records: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Merge records that agree in the keys: the largest of each number, the union of each list."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        key = tuple(str(record[k]) for k in keys)
        mine = found.setdefault(key, {**{k: record[k] for k in keys}, "specialisations": 0})
        mine["specialisations"] += 1
        for name, value in record.items():  # in the record's order; that of a set would vary between processes
            if name in keys:
                continue
            if isinstance(value, list | tuple):
                mine[name] = sorted({*mine.get(name, []), *value})
            else:
                mine[name] = max(mine.get(name, 0), value)
    return list(found.values())


def of_triton(*ops: str) -> list[dict[str, Any]]:
    """Compile the launches of the workloads of some ops, or of all, by Triton, and summarise their records."""
    numbers = ("registers", "spills", "shared", "loads", "stores")
    keys = ("op", "kernel", "target", "types")
    records = run("tests/helpers/compile_kernels.py", "--real", *ops, interpret=False)
    if spilling := [record for record in records if record["spills"]]:
        raise SystemExit(f"static_report: registers are spilled: {spilling}")
    return summarised([{k: r[k] for k in (*keys, *numbers)} for r in records if r["real"]], keys)


def of_cuda(nvcc: str) -> list[dict[str, Any]]:
    """Compile csrc/ by nvcc, and summarise its kernels: those for vectors of 16 bytes separately from the others."""
    records = []
    for name, by_architecture in compile_cuda.compile_all(nvcc).items():
        kernel, _, arguments = name.partition("<")
        types = sorted(set(re.findall(r"float|__half|__nv_bfloat16|unsigned short", arguments)))
        for architecture, usage in by_architecture.items():
            place = {"kernel": kernel, "target": f"sm_{architecture}", "types": types}
            records.append({**place, "vectors": compile_cuda.in_vectors(name), **dataclasses.asdict(usage)})
    return summarised(records, ("kernel", "target", "types", "vectors"))


@functools.cache
def saturation(*ops: str) -> dict[str, list[dict[str, Any]]]:
    """Run the real shapes of some ops, or of all, and return both sections that come of it."""
    found: dict[str, list[dict[str, Any]]] = run("-m", "tests.ptx.saturation", *ops, interpret=True)
    return found


def nvcc_version(nvcc: str) -> str:
    """Return nvcc's version, such as "13.0.88"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else said.strip()


def make() -> dict[str, Callable[..., list[dict[str, Any]]]]:
    """Map each section to the function that makes it, of the ops `BY_OP` that it is given, or of all."""
    return {
        "traffic": lambda: run("-m", "tests.helpers.traffic", interpret=True),
        "executed": lambda *ops: run("-m", "tests.ptx.coverage", *ops, interpret=True),
        "saturation": lambda *ops: saturation(*ops)["saturation"],
        "predicted": lambda *ops: saturation(*ops)["predicted"],
        "triton": of_triton,
        "cuda": lambda: of_cuda(found_nvcc()),
    }


def requested(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Map each section that is asked for to the ops whose records are; to none for all of them."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        section, _, ops = name.partition(":")
        if section not in make():
            raise SystemExit(f"static_report: a section is one of {', '.join(make())}, got {section}")
        if section in found:
            raise SystemExit(f"static_report: {section} is named twice; its ops are separated by commas")
        found[section] = tuple(ops.split(",")) if ops else ()
        if ops and section not in BY_OP:
            raise SystemExit(f"static_report: {section} is regenerated as a whole, got {name}")
        if unknown := set(found[section]) - set(OPS):
            raise SystemExit(f"static_report: there is no op {', '.join(sorted(unknown))}")
    together = [found[section] for section in sorted(TOGETHER) if section in found]
    if len({*together}) > 1:
        raise SystemExit(f"static_report: {' and '.join(sorted(TOGETHER))} are regenerated together, of the same ops")
    return found | dict.fromkeys(TOGETHER if together else (), *together[:1])


def replaced(before: list[dict[str, Any]], found: list[dict[str, Any]], ops: tuple[str, ...]) -> list[dict[str, Any]]:
    """Replace the records of some ops in their place, or all records where no op is named."""
    if not ops:
        return found
    order = list(dict.fromkeys(record["op"] for record in [*before, *found]))
    kept = [record for record in before if record["op"] not in ops]
    return sorted([*kept, *found], key=lambda record: order.index(record["op"]))


def found_nvcc() -> str:
    """Return the path of nvcc, or exit with a message."""
    nvcc = compile_cuda.find_nvcc()
    if nvcc is None:
        raise SystemExit("static_report: there is no nvcc on PATH or in CUDA_HOME")
    return nvcc


def main(names: list[str]) -> None:
    makers = make()
    wanted = requested(names) or dict.fromkeys(makers, ())
    versions = {name: metadata.version(name) for name in ("torch", "triton")} | {"nvcc": nvcc_version(found_nvcc())}
    before = json.loads(REPORT.read_text()) if names else {}
    sections = {
        name: replaced(before.get(name, []), one(*wanted[name]), wanted[name]) if name in wanted else before[name]
        for name, one in makers.items()
    }
    units = "bytes, but registers; widths are of single loads and stores of global memory"
    head = {"date": datetime.date.today().isoformat(), "versions": versions, "units": units}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for name, records in sections.items():  # one line per record, so that a diff shows the changed records
        rows = ",\n".join(json.dumps(record) for record in records)
        lines.append(f'"{name}": [\n{rows}\n]')
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if len(text) > MOST_BYTES:
        raise SystemExit(f"static_report: {len(text)} bytes, more than {MOST_BYTES}: summarise more")
    REPORT.write_text(text)
    print(f"{REPORT.relative_to(ROOT)}: {len(text)} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
