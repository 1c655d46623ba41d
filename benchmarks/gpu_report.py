"""``make gpu-report``: on a machine with a GPU, build, run GPU tests and benchmarks, and keep logs and results.

    python -m vlmfast bench gpu [--out FOLDER] [--copy FOLDER] [--limit SECONDS] [--again] [--rehearse]

Installs nothing (needs torch, triton, transformers, pytest, rich, setuptools; nvcc for the CUDA kernels). The most
important numbers come first. Each step writes its own log, the benchmarks write after every workload, and the tests
after every test, so a stop loses only what is in progress. The next call goes on with the steps that have not
succeeded, where each of them stopped: objects that are compiled, workloads that are timed and tests that have passed
are not done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmfast.benchmarks import report
from vlmfast.benchmarks.peers import installed
from vlmfast.console import CommandError

ROOT = Path(__file__).resolve().parents[1]  # not the folder of the link vlmfast/benchmarks
SAME = (*report.SAME, "sources")  # an earlier call with others is not gone on with
LIBRARY = ROOT / "vlmfast" / "_C.so"
SLOWER = 4  # times as long as a GPU's machine of 16 cores has, for each step of a rehearsal on two busy ones
BUILD = """
import pathlib, runpy
setup = runpy.run_path("setup.py")  # without setuptools, which may be too old to read pyproject.toml
setup["build"](pathlib.Path("vlmfast/_C.so").absolute(), pathlib.Path("build/gpu-report").absolute())
"""
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
DECODE = {"cuda": ("qwen3-vl-8b",), "cpu": ("qwen3-vl-8b", "--size", "narrow")}
PREFILL = {"cuda": ("llava-next-7b",), "cpu": ("llava-1.5-7b", "--size", "small")}
OPS = {"cuda": (), "cpu": ("silu_mul:1x6144", "top_tokens:5x576", "row_index:1x600x2048")}  # () is all of them
MATMUL = {"cuda": ("pixel_shuffle_gemm",), "cpu": ("pixel_shuffle:1 x nanoVLM",)}
REPORTS = ("deciding", "decode", "prefill", "ops", "compiled", "matmul", "models")


@dataclass(frozen=True)
class Step:
    """One command and the seconds that are set aside for it; it may also use what earlier steps have left over.

    With ``most`` it may take longer at the cost of the last steps, because the numbers of the others depend on it.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    most: float = 0.0


def steps(out: Path, device: str = "cuda") -> list[Step]:
    """List the steps, the most important first, because the time limit cuts off the last ones.

    Device "cpu" rehearses: the same steps, with less work in each.
    """
    here, gpu = {name: str(out / f"{name}.json") for name in REPORTS}, device == "cuda"
    bench = [sys.executable, "-m", "vlmfast", "bench"]
    ops = [*bench, "ops", "--device", device, "--resume"]
    models = [*bench, "models", "--device", device, "--resume", "--modes", "eager,graph" if gpu else "eager"]
    # Without torch.compile, whose compilation takes longer than everything else.
    peers = ["--peers", *(kind for kind in installed() if kind != "compile")]
    architecture = {}
    if gpu:
        architecture = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    compiled = ("rms_norm", "add_rms_norm", "deepstack_add") if gpu else ("rms_norm:1x2048",)
    several = ("qwen2.5-vl-7b", "smolvlm-256m") if gpu else ("smolvlm-256m", "--size", "narrow")
    found = [
        Step("build", [sys.executable, "-c", BUILD], 120, architecture, most=240),
        Step("deciding", [*ops, *DECIDING[device], *peers, "--json", here["deciding"]], 60),
        Step("decode", [*models, *DECODE[device], "--json", here["decode"]], 70),
        Step("prefill", [*models, *PREFILL[device], "--json", here["prefill"]], 60),
        Step("tests", [sys.executable, "-m", "vlmfast.benchmarks.gpu_tests", str(out)], 90),
        Step("info", [sys.executable, "-m", "vlmfast", "info"], 10),
        Step("ops", [*ops, *OPS[device], *peers, "--json", here["ops"]], 70),
        Step("page", [*bench, "ops", "--from", here["ops"], "--html", str(out / "report.html")], 10),
        Step("compiled", [*ops, *compiled, "--peers", "compile", "--json", here["compiled"]], 20),
        Step("matmul", [*ops, *MATMUL[device], *peers, "--json", here["matmul"]], 10),
        Step("models", [*models, *several, "--json", here["models"]], 5),
        Step("demo", [sys.executable, "-m", "vlmfast", "demo", "--device", device], 5),
    ]
    can_draw = importlib.util.find_spec("matplotlib") is not None
    return [step for step in found if can_draw or step.name != "page"]


def sources() -> str:
    """Return a digest of the code that is timed."""
    files = (path for folder in ("csrc", "kernels", "vlmfast/ops") for path in sorted((ROOT / folder).rglob("*.*")))
    digest = hashlib.sha256()
    for path in files:
        if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(step: Step, out: Path, copy: Path | None, seconds: float) -> Done:
    """Run one step with its own log for at most ``seconds``, and return its outcome and duration."""
    start, code = time.monotonic(), None
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", **step.environment}
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            while code is None and (left := seconds - (time.monotonic() - start)) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(left, 5.0))
                _copy(out, copy)
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # the whole group: the step may have started compilers
                process.wait()
    taken = time.monotonic() - start
    print(f"{step.name}: {'stopped' if code is None else f'exit code {code}'} after {taken:.0f} s", flush=True)
    return {"step": step.name, "exit_code": code, "seconds": round(taken, 1)}


def _copy(out: Path, copy: Path | None) -> None:
    """Put all results into a second folder too: what a machine hands back, even if it ends before this process."""
    if copy is not None:
        unfinished = shutil.ignore_patterns(".*")  # `report.write` replaces a file by one whose name begins with a dot
        with contextlib.suppress(OSError):  # a file that has just gone, or a full disk: no reason to end the report
            shutil.copytree(out, copy, dirs_exist_ok=True, ignore=unfinished)


def _earlier(out: Path, where: dict[str, Any], again: bool) -> dict[str, Done]:
    """Return the steps that an earlier call with the same device, versions and code has finished; they are not rerun.

    With ``again``, or where something has changed, what there is of results is removed: no step goes on with it.
    """
    summary = out / "summary.json"
    found: dict[str, Any] = {"environment": where, "steps": []}
    if summary.exists():
        found = json.loads(summary.read_text())
    if changed := report.changed(found["environment"], where, SAME):
        print(f"all of it again: {', '.join(changed)} changed since {summary}")
    if again or changed:
        for path in (*(out / f"{name}.json" for name in (*REPORTS, "summary")), *out.glob("tests-*.passed")):
            path.unlink(missing_ok=True)
        return {}
    done = {step["step"]: step for step in found["steps"] if step["exit_code"] == 0}
    if not LIBRARY.exists():  # results may have been brought to another machine, without what was built
        done.pop("build", None)
    return done


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Stop the running step if this process is terminated: it has a session of its own, and would go on."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: Namespace) -> int:
    """Run every step within ``options.limit`` seconds, with results in ``options.out``; return 0 if all succeed."""
    device, slower = ("cpu", SLOWER) if options.rehearse else ("cuda", 1)
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "bench gpu needs a GPU, and torch sees none; its steps run on a CPU by `vlmfast bench gpu --rehearse`"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    where, planned = report.environment(device) | {"sources": sources()}, steps(options.out.resolve(), device)
    done = _earlier(options.out, where, options.again)
    to_do = [step for step in planned if step.name not in done]
    print(
        f"seconds set aside, {sum(step.seconds for step in to_do):g} of {options.limit:g}; what is left over goes on:"
    )
    print(", ".join(f"{step.name} {'done' if step.name in done else f'{step.seconds:g}'}" for step in planned))
    if slower > 1:
        print(f"a rehearsal: each step has {slower} times as long, and less to do", flush=True)

    def summarise() -> None:
        steps_done = [done[step.name] for step in planned if step.name in done]
        summary = json.dumps({"environment": where, "steps": steps_done}, indent=1)
        (options.out / "summary.json").write_text(f"{summary}\n")

    summarise()  # what a stop in the first step leaves is of this device and code
    start, share = time.monotonic(), 0.0
    with _terminated_as_interrupted():
        for step in to_do:
            gone = time.monotonic() - start
            share = max(share, gone) + slower * step.seconds
            left = max(min(share, slower * options.limit) - gone, slower * step.most)
            done[step.name] = _run(step, options.out, options.copy, max(1.0, left))
            summarise()
            _copy(options.out, options.copy)
    if device == "cuda":
        folder = re.sub(r"[^a-z0-9]+", "-", report.device_name("cuda").lower()).strip("-")
        print(f"to show it in the README: commit {options.out} as benchmarks/results/{folder}, then `make docs`")
    return 0 if all(done[step.name]["exit_code"] == 0 for step in planned) else 1


if __name__ == "__main__":
    from vlmfast.benchmarks.command import moved

    moved("gpu")
