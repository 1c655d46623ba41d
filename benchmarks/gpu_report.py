"""``make gpu-report``: on a machine with a GPU, build, run GPU tests and benchmarks, and keep logs and results.

    python -m vlmfast bench gpu [--out FOLDER] [--limit SECONDS] [--again] [--rehearse]

Installs nothing (needs torch, triton, transformers, pytest, rich; nvcc for the CUDA kernels). The most important
numbers come first. Each step writes its own log, and the benchmarks write after every workload, so a stop loses only
the workload in progress. The next call continues with the steps that have not succeeded.
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
from typing import Any

import torch

from vlmfast.benchmarks import report
from vlmfast.benchmarks.peers import installed
from vlmfast.console import CommandError

ROOT = Path(__file__).resolve().parents[1]  # not the folder of the link vlmfast/benchmarks
SAME = ("device", "vlmfast", "torch", "triton", "transformers", "python")  # an earlier call with others is not resumed
Done = dict[str, Any]


# Device -> op and workload of the numbers that are measured first.
DECIDING = {
    "cuda": (
        "rms_norm:1x4096",
        "rms_norm:32768x4096",
        "rms_norm_backward:32768x4096",
        "add_rms_norm:4096x4096",
        "place_embeddings:8x4096x4096",
        "deepstack_add:8x4096x4096",
        "cls_attention:5x16x577x64 projected",
        "pixel_shuffle_norm:16 x InternViT-300M",
        "visionzip:5x576x1024",
        "merge_rows:1x1024x3584",
    ),
    "cpu": ("rms_norm:1x4096", "rms_norm_backward:600x2048", "visionzip:5x576x1024"),
}


@dataclass(frozen=True)
class Step:
    """One command and the seconds that are set aside for it; it may also use what earlier steps have left over."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def steps(out: Path, device: str = "cuda") -> list[Step]:
    """List the steps, the most important first, because the time limit cuts off the last ones.

    Device "cpu" rehearses: the same steps, with less work in each.
    """
    vlmfast = [sys.executable, "-m", "vlmfast"]
    bench = [*vlmfast, "bench", "ops", "--device", device]
    # Without torch.compile, whose compilation takes longer than everything else.
    peers = ["--peers", *(kind for kind in installed() if kind != "compile")]
    models = [
        *vlmfast,
        "bench",
        "models",
        "--device",
        device,
        "--modes",
        "eager,graph" if device == "cuda" else "eager",
    ]
    compiled = ["rms_norm", "add_rms_norm", "deepstack_add", "--peers", "compile"]
    page = ["--from", str(out / "ops.json"), "--html", str(out / "report.html")]
    architecture = {}
    if device == "cuda":
        architecture = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    found = [
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 120, architecture),
        Step("deciding", [*bench, *DECIDING[device], *peers, "--json", str(out / "deciding.json")], 60),
        Step("decode", [*models, "qwen3-vl-8b", "--json", str(out / "decode.json")], 70),
        Step("prefill", [*models, "llava-next-7b", "--json", str(out / "prefill.json")], 60),
        Step("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], 90),
        Step("info", [*vlmfast, "info"], 10),
        Step("ops", [*bench, *peers, "--json", str(out / "ops.json")], 70),
        Step("page", [*vlmfast, "bench", "ops", *page], 10),
        Step("compiled", [*bench, *compiled, "--json", str(out / "compiled.json")], 20),
        Step("matmul", [*bench, "pixel_shuffle_gemm", *peers, "--json", str(out / "matmul.json")], 10),
        Step("models", [*models, "qwen2.5-vl-7b", "smolvlm-256m", "--json", str(out / "models.json")], 5),
        Step("demo", [*vlmfast, "demo", "--device", device], 5),
    ]
    can_draw = importlib.util.find_spec("matplotlib") is not None
    return [step for step in found if can_draw or step.name != "page"]


def _run(step: Step, out: Path, seconds: float) -> Done:
    """Run one step with its own log for at most ``seconds``, and return its outcome and duration."""
    start = time.monotonic()
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", **step.environment}
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)  # the whole group: the step may have started compilers
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            code = None
    taken = time.monotonic() - start
    print(f"{step.name}: {'stopped' if code is None else f'exit code {code}'} after {taken:.0f} s", flush=True)
    return {"step": step.name, "exit_code": code, "seconds": round(taken, 1)}


def _earlier(out: Path, where: dict[str, Any]) -> dict[str, Done]:
    """Return the steps that an earlier call with the same device and versions has finished; they are not rerun."""
    summary = out / "summary.json"
    if not summary.exists():
        return {}
    found = json.loads(summary.read_text())
    changed = [name for name in SAME if found["environment"].get(name) != where.get(name)]
    if changed:
        print(f"all of it again: {', '.join(changed)} changed since {summary}")
        return {}
    return {step["step"]: step for step in found["steps"] if step["exit_code"] == 0}


def run(options: Namespace) -> int:
    """Run every step within ``options.limit`` seconds, with results in ``options.out``; return 0 if all succeed."""
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("bench gpu needs a GPU, and torch sees none; --rehearse runs its steps on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    where, planned = report.environment(device), steps(options.out.resolve(), device)
    done = {} if options.again else _earlier(options.out, where)
    to_do = [step for step in planned if step.name not in done]
    print(
        f"seconds set aside, {sum(step.seconds for step in to_do):g} of {options.limit:g}; what is left over goes on:"
    )
    print(", ".join(f"{step.name} {'done' if step.name in done else f'{step.seconds:g}'}" for step in planned))
    start, share = time.monotonic(), 0.0
    for step in to_do:
        share += step.seconds
        left = min(share, options.limit) - (time.monotonic() - start)
        done[step.name] = _run(step, options.out, max(1.0, left))
        steps_done = [done[other.name] for other in planned if other.name in done]
        (options.out / "summary.json").write_text(
            json.dumps({"environment": where, "steps": steps_done}, indent=1) + "\n"
        )
    if device == "cuda":
        folder = re.sub(r"[^a-z0-9]+", "-", report.device_name("cuda").lower()).strip("-")
        print(f"to show it in the README: commit {options.out} as benchmarks/results/{folder}, then `make docs`")
    return 0 if all(done[step.name]["exit_code"] == 0 for step in planned) else 1


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("gpu")
