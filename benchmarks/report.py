"""What a benchmark writes down: where and when it ran, and a table to read."""

from __future__ import annotations

import datetime
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vlmfast


def device_name(device: str) -> str:
    """The name of the GPU or the processor."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """Where and when: device, versions, date, and what changes a CPU's speed."""
    packages = {name: _version(name) for name in ("torch", "triton", "transformers")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "vlmfast": vlmfast.__version__,
        **packages,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(path: Path, device: str, records: list[dict[str, Any]]) -> None:
    """Write what is known so far; called after every record, so that a stop loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), "records": records}, indent=1) + "\n")


def show(console: Console, device: str, records: list[dict[str, Any]]) -> None:
    """One table per op. Times are medians; every ratio is the median of its rounds' ratios."""
    kind = "device time, cold cache" if device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    for op in dict.fromkeys(r["op"] for r in records):
        table = Table(title=f"{op}, {records[0]['dtype']}, {kind}", title_justify="left")
        for name in ("shape", "", "us", "wall us", "GB/s", "x transformers", "x torch.compile", "time / copy"):
            table.add_column(name, justify="left" if name in ("shape", "") else "right")
        for record in (r for r in records if r["op"] == op):
            for index, (name, row) in enumerate(record["times"].items()):
                cells = [f"{row['us']:.2f}", f"{row['wall_us']:.2f}", f"{row['gb_per_s']:.1f}"]
                cells += [f"{row[k]:.2f}" if k in row else "" for k in ("speedup", "speedup_over_compile", "over_copy")]
                style = "bold" if name.startswith("vlmfast") else None
                table.add_row("" if index else record["workload"], name, *cells, style=style)
            for name, reason in record["failed"].items():
                table.add_row("", name, f"no speed: {reason}", style="red")
            table.add_section()
        console.print(table)
