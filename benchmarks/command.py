"""The command line of the benchmarks: ``python -m vlmfast bench {ops,models,training,launches,gpu,digits}``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vlmfast.benchmarks import digits, digits_models, gpu_report, launches, modes, peers, published, training
from vlmfast.benchmarks.bench import KNOWN, PUBLIC, run
from vlmfast.console import DEFAULT, DTYPES, positive, seconds, seed
from vlmfast.demo_reduce import parse_method

NAMES = ("ops", "models", "training", "launches", "gpu", "digits")


def add(commands: Any) -> None:
    """Add the ``bench`` command to the subparsers."""
    text = "time the ops, and whole models, against their peers and the limits of this machine"
    bench = commands.add_parser("bench", help=text, description=f"{text}. Without one of these names: ops.")
    benches = bench.add_subparsers(title="benchmarks", required=True)
    model: dict[str, Any] = {"metavar": "MODEL", "nargs": "*", "type": _one_of("model", published.MODELS)}

    command = _add_timed(benches, "ops", "the ops, on their real shapes")
    command.set_defaults(size=None, modes=[], budget=None, reduce=None, layers=None)
    what = "such as rms_norm, or rms_norm:600x2048 alone; default: every public op"
    command.add_argument("ops", metavar="OP[:WORKLOAD]", nargs="*", type=_op, help=what)
    kinds = (*peers.KINDS, "none")
    what = f"of {', '.join(kinds)}; default: those installed"
    command.add_argument("--peers", metavar="PEER", nargs="+", type=_one_of("peer", kinds), help=what)
    command.add_argument("--models", **model, help="whole models as well, or alone; none: all")
    what = "show what an earlier run wrote with --json"
    command.add_argument("--from", dest="source", metavar="FILE", type=Path, help=what)

    text = "whole models: first and further tokens, memory; eager, compiled, CUDA graph"
    command = _add_timed(benches, "models", text)
    command.set_defaults(ops=[], peers=None, source=None)
    command.add_argument("models", **model, help="default: all")
    what = "as published (default on a GPU), small (default on a CPU), or narrow: the time of the host alone"
    command.add_argument("--size", choices=published.SIZES, help=what)
    command.add_argument("--full", dest="size", action="store_const", const="full", help="the same as --size full")
    what = "how visual tokens are reduced, such as fastv:2:0.5; default: the method of each model"
    command.add_argument("--reduce", metavar="METHOD", type=parse_method, help=what)
    what = "how many layers the language model has; default: as many as in --size"
    command.add_argument("--layers", metavar="N", type=positive, help=what)
    mode, what = _one_of("mode", modes.MODES), f"of {','.join(modes.MODES)}; default: all that the device has"
    command.add_argument("--modes", type=lambda text: [*map(mode, text.split(","))], default=[], help=what)
    command.add_argument("--budget", metavar="SECONDS", type=seconds, help="begin no other model after so many seconds")

    text = "steps of training with fewer visual tokens, or patched alone: time, memory, losses, error of gradients"
    command = _add(benches, "training", training.run, text)
    which = _one_of("model", training.REDUCIBLE)
    command.add_argument("models", metavar="MODEL", nargs="*", type=which, help="default: all that can be reduced")
    command.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=DEFAULT)
    command.add_argument("--threads", metavar="N", type=positive, default=1, help=f"of the CPU; {DEFAULT}")
    command.add_argument("--size", choices=published.SIZES, help="default: small on a CPU, full on a GPU")
    command.add_argument("--steps", metavar="N", type=positive, default=32, help=f"of each variant; {DEFAULT}")
    what = "a patched model with all visual tokens, in place of one with fewer"
    command.add_argument("--all-tokens", action="store_true", help=what)
    command.add_argument("--json", metavar="FILE", type=Path, help="the records")

    text = "kernel launches and host synchronisations of whole models, counted without a GPU"
    command = _add(benches, "launches", launches.run, text)
    command.add_argument("models", **model, help="default: all")
    command.add_argument("--json", metavar="FILE", type=Path, help="the records")

    text = "all that a machine with a GPU can tell: build, tests and benchmarks, each with a log"
    command = _add(benches, "gpu", gpu_report.run, text)
    command.add_argument("--out", type=Path, default=gpu_report.ROOT / "gpu-report", help="folder for logs and JSON")
    command.add_argument(
        "--limit", metavar="SECONDS", type=seconds, default=530, help=f"for all steps together; {DEFAULT}"
    )
    command.add_argument("--copy", metavar="FOLDER", type=Path, help="where all of it is put too, every few seconds")
    command.add_argument("--again", action="store_true", help="also what an earlier call into the folder has finished")
    command.add_argument(
        "--rehearse", action="store_true", help="with this CPU in the place of a GPU, less of each step"
    )

    text = "accuracy against token budget, of small models trained from scratch on pictures and videos"
    command = _add(benches, "digits", digits.run, text)
    task = _one_of("task", digits_models.TASKS)
    command.add_argument("tasks", metavar="TASK", nargs="*", type=task, help="pictures or videos; default: both")
    command.add_argument("--out", type=Path, default=digits.RESULTS, help="folder of the results")
    what = "folder that keeps trained models, and has those that need not be trained again"
    command.add_argument("--weights", metavar="FOLDER", type=Path, help=what)
    command.add_argument("--steps", type=positive, help="of a training; default: that of the task")
    command.add_argument("--batch", type=positive, help="samples of a step; default: that of the task")
    command.add_argument("--seeds", metavar="SEED", nargs="+", type=seed, default=[0, 1, 2], help=DEFAULT)
    command.add_argument("--test-samples", metavar="N", type=positive, default=150, help=DEFAULT)


def _add(benches: Any, name: str, run: Callable[[Any], int], text: str, more: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = benches.add_parser(name, help=text, description=f"{text}.{more}")
    command.set_defaults(command=run)
    return command


def _add_timed(benches: Any, name: str, text: str) -> argparse.ArgumentParser:
    command = _add(benches, name, run, text, " Exit code 1 if a result of ours is wrong or missing.")
    command.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    what = "default: bfloat16; for models float32 on a CPU, bfloat16 on a GPU"
    command.add_argument("--dtype", choices=DTYPES, help=what)
    command.add_argument("--threads", metavar="N", type=positive, default=1, help=f"of the CPU; {DEFAULT}")
    command.add_argument("--html", metavar="FILE", type=Path, help="a report to look at, with JSON and CSV beside it")
    command.add_argument("--json", metavar="FILE", type=Path, help="the records; of ops as a CSV too, beside them")
    what = "go on with what the file of --json has without an error, of the same device and versions"
    command.add_argument("--resume", action="store_true", help=what)
    return command


def _one_of(kind: str, names: Collection[str], shown: Collection[str] = ()) -> Callable[[str], str]:
    """Return a ``type`` for argparse that checks names; argparse's ``choices`` would not allow an empty list."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text}; known: {', '.join(shown or names)}")
        return text

    return check


_known_op = _one_of("op", KNOWN, PUBLIC)


def _op(text: str) -> str:
    """Check the name of an op; its workloads, which depend on device and dtype, are checked later."""
    _known_op(text.partition(":")[0])
    return text


def moved(name: str) -> None:
    """Run a benchmark under the former command of its module (``python -m <module>``), and exit."""
    from vlmfast import cli

    arguments = [argument for argument in sys.argv[1:] if argument != "--count"]
    name = name if "--count" not in sys.argv else "launches"
    warnings.warn(f"this command is now `python -m vlmfast bench {name}`", DeprecationWarning, stacklevel=2)
    sys.exit(cli.main(["bench", name, *arguments]))
