"""``make gpu-report``: on a machine with a GPU, build, run the GPU tests and the benchmarks, and keep what came out.

    python -m vlmfast bench gpu [--out FOLDER] [--limit SECONDS]

Needs nothing that is not installed already (torch, triton, transformers, pytest, rich; nvcc for the CUDA kernels).
Each step writes its own log, and the benchmarks write after every workload, so a stop loses only what was running.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlmfast.benchmarks import report
from vlmfast.benchmarks.peers import installed
from vlmfast.console import CommandError

ROOT = Path(__file__).resolve().parents[1]  # not the folder of the link vlmfast/benchmarks


@dataclass(frozen=True)
class Step:
    """One command, with the seconds that it may take at most, so that those after it have their share."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def steps(out: Path) -> list[Step]:
    """List the steps in order of worth: of what the limit leaves out, the last is missed least."""
    vlmfast = [sys.executable, "-m", "vlmfast"]
    bench = [*vlmfast, "bench", "--device", "cuda"]
    # Without torch.compile, which takes longer to compile than all else takes to run.
    peers = ["--peers", *(kind for kind in installed() if kind != "compile")]
    models = [*vlmfast, "bench", "models", "qwen3-vl-8b", "llava-next-7b", "qwen2.5-vl-7b", "smolvlm-256m"]
    models += ["--device", "cuda", "--modes", "eager,graph", "--budget", "120"]
    compiled = ["rms_norm", "add_rms_norm", "deepstack_add", "--peers", "compile"]
    architecture = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    page = ["--from", str(out / "ops.json"), "--html", str(out / "report.html")]
    found = [
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, architecture),
        Step("info", [*vlmfast, "info"], 60),
        Step("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], 150),
        Step("ops", [*bench, *peers, "--json", str(out / "ops.json")], 150),
        Step("matmul", [*bench, "pixel_shuffle_gemm", *peers, "--json", str(out / "matmul.json")], 60),
        Step("page", [*vlmfast, "bench", *page], 60),
        Step("models", [*models, "--json", str(out / "models.json")], 200),
        Step("compiled", [*bench, *compiled, "--json", str(out / "compiled.json")], 90),
        Step("demo", [*vlmfast, "demo", "--device", "cuda"], 60),
    ]
    can_draw = importlib.util.find_spec("matplotlib") is not None
    return [step for step in found if can_draw or step.name != "page"]


def _run(step: Step, out: Path, seconds: float) -> dict[str, object]:
    """Run one step with its own log, and return what happened and how long it took."""
    start = time.monotonic()
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", **step.environment}
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(min(seconds, step.seconds))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started (compilers, say) too
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            code = None
    taken = time.monotonic() - start
    print(f"{step.name}: {'stopped' if code is None else f'exit code {code}'} after {taken:.0f} s", flush=True)
    return {"step": step.name, "exit_code": code, "seconds": round(taken, 1)}


def run(options: Namespace) -> int:
    """Run every step, within ``options.limit`` seconds, into ``options.out``; 0 if all of them ended well."""
    if not torch.cuda.is_available():
        raise CommandError("bench gpu needs a GPU, and torch sees none")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, done = time.monotonic() + options.limit, []
    for step in steps(options.out.resolve()):
        done.append(_run(step, options.out, max(1.0, deadline - time.monotonic())))
        summary = {"environment": report.environment("cuda"), "steps": done}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    folder = re.sub(r"[^a-z0-9]+", "-", report.device_name("cuda").lower()).strip("-")
    print(f"to show it in the README: commit {options.out} as benchmarks/results/{folder}, then `make docs`")
    return 0 if all(step["exit_code"] == 0 for step in done) else 1


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("gpu")
