"""``make gpu-report``: on a machine with a GPU, build, run the GPU tests and the benchmarks, and keep what came out.

    python -m benchmarks.gpu_report [--out FOLDER] [--limit SECONDS]

Needs nothing that is not installed already (torch, triton, transformers, pytest, rich; nvcc for the CUDA kernels).
Each step writes its own log, and the benchmarks write after every workload, so a stop loses only what was running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from vlmfast.benchmarks import report
from vlmfast.benchmarks.peers import installed

ROOT = Path(__file__).resolve().parents[1]  # not the folder of the link vlmfast/benchmarks


def steps(out: Path) -> dict[str, list[str]]:
    """Name -> command, in order of worth."""
    python = [sys.executable, "-m"]
    bench = [*python, "vlmfast", "bench", "--device", "cuda"]
    # Without torch.compile, which takes longer to compile than all else takes to run.
    peers = ["--peers", *(kind for kind in installed() if kind != "compile")]
    return {
        "build": [sys.executable, "setup.py", "build_ext", "--inplace"],
        "info": [*python, "vlmfast", "info"],
        "tests": [*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        "ops": [*bench, *peers, "--json", str(out / "ops.json")],
        "compiled": [*bench, "rms_norm", "add_rms_norm", "deepstack_add", "--json", str(out / "compiled.json")],
        "demo": [*python, "vlmfast", "demo", "--device", "cuda"],
    }


def run(name: str, command: list[str], out: Path, seconds: float) -> dict[str, object]:
    """Run one step with its own log; what happened and how long it took."""
    start = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    taken = time.monotonic() - start
    print(f"{name}: {'stopped' if code is None else f'exit code {code}'} after {taken:.0f} s", flush=True)
    return {"step": name, "exit_code": code, "seconds": round(taken, 1)}


def main() -> int:
    """Run every step within the time limit; 0 if all of them ended well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report", help="folder for logs and JSON")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all steps together (default 530)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-report needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, done = time.monotonic() + options.limit, []
    for name, command in steps(options.out.resolve()).items():
        done.append(run(name, command, options.out, max(1.0, deadline - time.monotonic())))
        summary = {"environment": report.environment("cuda"), "steps": done}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if all(step["exit_code"] == 0 for step in done) else 1


if __name__ == "__main__":
    sys.exit(main())
