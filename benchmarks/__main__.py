"""Time every op: ``python -m benchmarks [op ...] [--device cpu|cuda] [--dtype bfloat16] [--threads 1] [--json FILE]``.

Ratios are taken within one run, from interleaved rounds. On a CPU the default is one thread: with more, a busy
neighbour decides. Pin the process (``taskset -c 1``) for steadier numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import vlmfast  # noqa: F401  (registers the ops)
from vlmfast.benchmarks import report
from vlmfast.benchmarks.ops import benchmark
from vlmfast.registry import OPS


def main() -> int:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="time every op against its peers")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of: {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", type=Path, help="write the records there")
    options = parser.parse_args()
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"unknown op {', '.join(unknown)}; known: {', '.join(OPS)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device cuda: torch sees no GPU")
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 130)
    records: list[dict[str, Any]] = []
    for name in options.ops or OPS:
        before = len(records)
        for found in benchmark(OPS[name], options.device, getattr(torch, options.dtype)):
            records.append(found)
            if options.json:
                report.write(options.json, options.device, records)
        report.show(console, options.device, records[before:])
    return 1 if any(r["failed"] for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
