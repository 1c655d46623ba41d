"""Output of the benchmarks: description of the environment, JSON and CSV files, and tables on the console."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

import vlmfast
from vlmfast.benchmarks import peers
from vlmfast.console import CommandError, cpu_capabilities, one_line, table, version

# Columns of the tables and the CSV: key in a contender's row or in a model's record -> (head, format).
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
MODEL_COLUMNS = {
    "prefill_ms": ("prefill ms", "{:.2f}"),
    "prefill_range": ("range", "{:.0%}"),
    "prefill_speedup": ("x original", "{:.2f}"),
    "prefill_over_eager": ("x eager", "{:.2f}"),
    "decode_ms": ("token ms", "{:.2f}"),
    "decode_range": ("range", "{:.0%}"),
    "decode_speedup": ("x original", "{:.2f}"),
    "decode_over_eager": ("x eager", "{:.2f}"),
    "cache_bytes": ("KV MB", "{:.1f}"),
    "peak_bytes": ("peak MB", "{:.0f}"),
}
SAME = ("device", "vlmfast", "torch", "triton", "transformers", "python")  # results of others are not gone on with
LEGEND = """us: median; spread: distance of the quartiles; wall us: an eager call, Python included
of ceiling: the larger of bytes / bandwidth of a large copy and FLOP / speed of a large matmul, over the time;
above 100% where the data lie in a cache
/ copy: time over that of a copy of as many bytes; x: how many times faster than; all ratios are of this one run
roundings: distance from the definition, of peers in roundings of the inputs' dtype; 0 is bit-equal
traffic: bytes counted over the fewest possible
in a graph: eight layers around the op, compiled, as are those of transformers; torch.compile: the definition alone"""
MODEL_LEGEND = """ms: median of the rounds; range: shortest to longest, over the median; x: median of the rounds' ratios
compile is of the language model alone; where the host waits in a prefill, it runs as in eager mode (no graph)"""


def device_name(device: str) -> str:
    """Return the name of the GPU or the processor."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """Describe the run: device, versions, date, and settings that change the speed."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "kind": device,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "vlmfast": vlmfast.__version__,
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "F.rms_norm": peers.functional_rms_norm(device),
    }
    return found if device == "cpu" else found | _gpu()


def _gpu() -> dict[str, Any]:
    """Ask the driver for its version and for the clocks and the power limit of the GPU."""
    properties = torch.cuda.get_device_properties()
    found = {"multiprocessors": properties.multi_processor_count, "memory_gb": round(properties.total_memory / 1e9, 1)}
    query = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"]
    asked = f"--id=GPU-{properties.uuid}"  # by UUID: the numbering of the driver may differ from torch's
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", asked]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):  # a GPU of another vendor, or nvidia-smi is not installed
        return found
    return found | dict(zip(query, map(str.strip, answer.split(",")), strict=False))


def read(path: Path) -> dict[str, Any]:
    """Read the file of an earlier run: "environment", "records" of its ops, and "models".

    Raises:
        CommandError: if the file cannot be read or is not the result of a run.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if "models" not in found:  # an older format of runs with whole models only
            found |= {"records": [], "models": found["records"]}
        for record in found["records"]:
            record["op"], record["workload"], record["dtype"]
            for row in record["contenders"]:
                row["name"], row["group"], row["error"]
                sum(row.get(key) or 0 for key in COLUMNS)  # fails unless each value is a number or missing
        for record in found["models"]:
            record["model"], record["variant"], record["size"], record["dtype"]
            record.get("error") or record["prefill_ms"]
        found["environment"]["device"], found["environment"]["kind"], found["environment"]["threads"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = one_line(error) if isinstance(error, OSError) else "it is not what `bench --json` writes"
        raise CommandError(f"cannot read {path}: {what}") from error
    return found


def changed(before: dict[str, Any], now: dict[str, Any], names: Iterable[str] = SAME) -> list[str]:
    """Name what differs between the environments of two runs, so that neither can go on with the other's results."""
    return [name for name in names if before.get(name) != now.get(name)]


def write(path: Path, run: dict[str, Any]) -> None:
    """Write the records so far atomically; called after every record, so that a stop loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def write_csv(path: Path, run: dict[str, Any]) -> None:
    """Write one line per op, workload and contender."""
    fields = ["op", "workload", "dtype", "bytes", "flops", "name", "group", *COLUMNS, "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for record in run["records"]:
            writer.writerows({**record, **row} for row in record["contenders"])


def columns(records: list[dict[str, Any]]) -> list[str]:
    """Return the columns to show: on a CPU the only time is that of an eager call."""
    rows = [row for record in records for row in record["contenders"]]
    filled = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return [key for key in filled if key != "wall_us" or any(row.get("us") != row.get("wall_us") for row in rows)]


def by_op(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the records of each op."""
    return [[r for r in records if r["op"] == name] for name in dict.fromkeys(r["op"] for r in records)]


def cells(columns: dict[str, tuple[str, str]], keys: Iterable[str], row: dict[str, Any]) -> list[str]:
    """Format a row's values in these columns; an empty string where it has none."""
    found = []
    for key in keys:
        value = row.get(key)
        text = "" if value is None else columns[key][1].format(value / 1e6 if key.endswith("_bytes") else value)
        waited = text and key == "prefill_ms" and row.get("prefill_graph", "captured") != "captured"
        found.append(f"{text} (no graph)" if waited else text)
    return found


def grouped(heads: Sequence[str], text: int, rows: Iterable[tuple[str | None, Sequence[str]]]) -> Table:
    """Make a table of rows, each a style and its cells, in groups.

    The first ``text`` columns are text; all of these but the last are shown only in the first row of each group.
    """
    lines, above = table(), None
    for index, head in enumerate(heads):
        lines.add_column(head, justify="left" if index < text else "right", no_wrap=True)
    for style, shown in rows:
        group = shown[: text - 1]
        if above not in (None, group):
            lines.add_section()
        lines.add_row(*([""] * len(group) if group == above else group), *shown[text - 1 :], style=style)
        above = group
    return lines


def show_table(
    console: Console, heads: Sequence[str], text: int, rows: Sequence[tuple[str | None, Sequence[str]]]
) -> None:
    """Print a table as `grouped` makes it; if it is too wide, print each row as several lines."""
    lines = grouped(heads, text, rows)
    if console.measure(lines, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(lines)
        return
    for style, shown in rows:
        console.print(", ".join(filter(None, shown[:text])), style=style, markup=False)
        named = [f"{head} {cell}" for head, cell in zip(heads[text:], shown[text:], strict=False) if cell]
        console.print(Padding(", ".join(named), (0, 0, 0, 2)), markup=False)


def show_errors(console: Console, lines: Iterable[str]) -> None:
    """Print error messages, one per line."""
    for line in lines:
        console.print(line, style="red", markup=False, soft_wrap=True)


def show_op(console: Console, records: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """Print the table of one op and the errors of its contenders."""
    filled, rows = columns(records), []
    shapes: dict[str, list[str]] = {}
    for record in records:
        for row in record["contenders"]:
            style = "bold" if row["group"] == "ours" else None
            if row["error"] is not None:
                style = "red"
                shapes.setdefault(f"{record['op']}, {row['name']}: {row['error']}", []).append(record["workload"])
            rows.append((style, [record["workload"], row["name"], *cells(COLUMNS, filled, row)]))
    kind = "device time, cold cache" if where["kind"] != "cpu" else f"{where['threads']} thread(s)"
    console.print(f"{records[0]['op']}, {records[0]['dtype']}, {kind}", style="bold")
    show_table(console, ("shape", "", *(COLUMNS[key][0] for key in filled)), 2, rows)
    show_errors(console, (f"{reason} ({', '.join(found)})" for reason, found in shapes.items()))


def show_models(console: Console, records: list[dict[str, Any]]) -> None:
    """Print the table of whole models; speed-ups are over the original in the same mode and over the eager original."""
    rows: list[tuple[str | None, list[str]]] = []
    errors = []
    for record in records:
        layers = f"{record['layers']} layer{'s' * (record['layers'] != 1)}" if "layers" in record else None
        model = ", ".join(filter(None, (record["model"], record.get("reduce"), layers)))
        named = [model, record.get("mode", ""), record["variant"]]
        if "error" in record:
            errors.append(f"{' '.join(named)}: {record['error']}")
            rows.append(("red", [*named, "no time"]))
        else:
            rows.append((None, [*named, *cells(MODEL_COLUMNS, MODEL_COLUMNS, record)]))
    show_table(console, ("model", "mode", "", *(head for head, _ in MODEL_COLUMNS.values())), 3, rows)
    if records:
        console.print(f"{records[0]['size']} sizes, {records[0]['dtype']}")
        console.print(MODEL_LEGEND, style="dim", highlight=False)
    show_errors(console, errors)
