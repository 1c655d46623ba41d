"""What a benchmark writes down: where and when it ran, JSON and CSV, and a table to read."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import vlmfast
from vlmfast.benchmarks import peers
from vlmfast.benchmarks.timing import Ceilings
from vlmfast.console import version

# Column of the table and of the CSV: key of a contender's row -> (head, format)
COLUMNS = {
    "us": ("us", "{:.2f}"),
    "spread": ("spread", "{:.0%}"),
    "wall_us": ("wall us", "{:.2f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "tflop_per_s": ("TFLOP/s", "{:.2g}"),
    "of_ceiling": ("of ceiling", "{:.0%}"),
    "over_copy": ("/ copy", "{:.2f}"),
    "x_transformers": ("x transformers", "{:.2f}"),
    "x_compile": ("x torch.compile", "{:.2f}"),
    "roundings": ("roundings", "{:.2g}"),
    "traffic": ("traffic", "{:.3f}"),
}
LEGEND = """us: median; spread: distance of the quartiles; wall us: an eager call, Python included
of ceiling: the larger of bytes / bandwidth of a large copy and FLOP / speed of a large matrix product, over the time;
above 100% where the data lie in a cache
/ copy: time over that of a copy of as many bytes; x: how many times faster than; all ratios are of this one run
roundings: distance from the definition, of peers in roundings of the inputs' dtype; 0 is bit-equal
traffic: bytes counted over the fewest possible"""


def device_name(device: str) -> str:
    """The name of the GPU or the processor."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str, machine: Ceilings | None = None) -> dict[str, Any]:
    """Where and when: device, versions, date, what changes its speed, and what it can do at most."""
    packages = {name: version(name) for name in ("torch", "triton", "transformers")}
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "kind": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "vlmfast": vlmfast.__version__,
        **packages,
        "F.rms_norm": peers.functional_rms_norm(device),
    }
    if device != "cpu":
        found |= _gpu()
    if machine is not None:
        found |= dataclasses.asdict(machine)
    return found


def _gpu() -> dict[str, Any]:
    """What sets the speed of the GPU, as far as its driver tells."""
    properties = torch.cuda.get_device_properties()
    found = {"multiprocessors": properties.multi_processor_count, "memory_gb": round(properties.total_memory / 1e9, 1)}
    query = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"]
    asked = f"--id=GPU-{properties.uuid}"  # the driver's first GPU need not be the one that is used
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", asked]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):  # another vendor's GPU, or no tool beside the driver
        return found
    return found | dict(zip(query, map(str.strip, answer.split(",")), strict=False))


def prefill_note(record: dict[str, Any]) -> str:
    """What has to stand beside the prefill of a whole model in mode graph where the host waits in it."""
    return "" if record.get("prefill_graph", "captured") == "captured" else " (no graph)"


def write(path: Path, run: dict[str, Any]) -> None:
    """Write what is known so far, whole or not at all; called after every record, so that a stop loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def write_csv(path: Path, run: dict[str, Any]) -> None:
    """One line per op, workload and contender."""
    fields = ["op", "workload", "dtype", "bytes", "flops", "name", "group", *COLUMNS, "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for record in run["records"]:
            writer.writerows({**record, **row} for row in record["contenders"])


def columns(records: list[dict[str, Any]]) -> list[str]:
    """The columns that say something: on a CPU an eager call is all there is to time."""
    rows = [row for record in records for row in record["contenders"]]
    filled = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return [key for key in filled if key != "wall_us" or any(row.get("us") != row.get("wall_us") for row in rows)]


def table(records: list[dict[str, Any]], kind: str) -> Table:
    """What was measured of one op."""
    filled = columns(records)
    shown = Table(title=f"{records[0]['op']}, {records[0]['dtype']}, {kind}", title_justify="left")
    for name in ("shape", "", *(COLUMNS[key][0] for key in filled)):
        shown.add_column(name, justify="left" if name in ("shape", "") else "right", no_wrap=True)
    for record in records:
        for index, row in enumerate(record["contenders"]):
            first = ["" if index else record["workload"], row["name"]]
            if row["error"] is not None:
                shown.add_row(*first, style="red")
                continue
            cells = [COLUMNS[key][1].format(row[key]) if row.get(key) is not None else "" for key in filled]
            shown.add_row(*first, *cells, style="bold" if row["group"] == "ours" else None)
        shown.add_section()
    return shown


def errors(records: list[dict[str, Any]]) -> list[str]:
    """One line per contender and reason why it has no time."""
    shapes: dict[str, list[str]] = {}
    for record in records:
        for row in record["contenders"]:
            if row["error"] is not None:
                shapes.setdefault(f"{record['op']}, {row['name']}: {row['error']}", []).append(record["workload"])
    return [f"{reason} ({', '.join(found)})" for reason, found in shapes.items()]
