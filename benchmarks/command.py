"""The command line of the benchmarks: ``python -m vlmfast bench {ops,models,launches,gpu,digits}``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vlmfast.benchmarks import bench, digits, gpu_report, launches, modes, peers, published
from vlmfast.console import DEFAULT, DTYPES, positive
from vlmfast.registry import OPS

NAMES = ("ops", "models", "launches", "gpu", "digits")


def add(commands: Any) -> None:
    """Add ``bench`` to the parsers of commands."""
    text = "time the ops, and whole models, against their peers and the limits of this machine"
    command = commands.add_parser("bench", help=text, description=f"{text}. Without one of these names: ops.")
    benches = command.add_subparsers(title="benchmarks", required=True)
    for name, add_one in zip(NAMES, (_add_ops, _add_models, _add_launches, _add_gpu, _add_digits), strict=True):
        add_one(lambda text, more="", name=name: benches.add_parser(name, help=text, description=f"{text}.{more}"))


def moved(name: str) -> int:
    """Run a benchmark from the module that was a command of its own."""
    from vlmfast import cli

    warnings.warn(f"this command is now `python -m vlmfast bench {name}`", DeprecationWarning, stacklevel=2)
    return cli.main(["bench", name, *sys.argv[1:]])


Adder = Callable[..., argparse.ArgumentParser]


def _add_ops(adder: Adder) -> None:
    command = _add_timed(adder, "the ops, on their real shapes")
    command.set_defaults(full=None, modes=[], budget=None)
    what = "such as rms_norm; default: every public op"
    command.add_argument("ops", metavar="OP", nargs="*", type=_one_of("op", OPS, bench.PUBLIC), help=what)
    kinds = (*peers.KINDS, "none")
    what = f"of {', '.join(kinds)}; default: those installed"
    command.add_argument("--peers", metavar="PEER", nargs="+", type=_one_of("peer", kinds), help=what)
    _add_models_argument(command, "--models", help="whole models as well, or alone; none: all")
    what = "show what an earlier run wrote with --json"
    command.add_argument("--from", dest="source", metavar="FILE", type=Path, help=what)


def _add_models(adder: Adder) -> None:
    command = _add_timed(adder, "whole models: first and further tokens, memory; eager, compiled, CUDA graph")
    command.set_defaults(ops=[], peers=None, source=None)
    _add_models_argument(command, "models", help="default: all")
    command.add_argument("--full", action="store_true", default=None, help="the published sizes (default on a GPU)")
    mode, what = _one_of("mode", modes.MODES), f"of {','.join(modes.MODES)}; default: all that the device has"
    command.add_argument("--modes", type=lambda text: [*map(mode, text.split(","))], default=[], help=what)
    command.add_argument("--budget", metavar="SECONDS", type=float, help="begin no other model after so many seconds")


def _add_timed(adder: Adder, text: str) -> argparse.ArgumentParser:
    command = adder(text, " Exit code 1 if a result of ours is wrong or missing.")
    command.set_defaults(command=bench.run)
    command.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    what = "default: bfloat16; for models float32 on a CPU, bfloat16 on a GPU"
    command.add_argument("--dtype", choices=DTYPES, help=what)
    command.add_argument("--threads", metavar="N", type=positive, default=1, help=f"of the CPU; {DEFAULT}")
    command.add_argument("--html", metavar="FILE", type=Path, help="a report to look at, with JSON and CSV beside it")
    command.add_argument("--json", metavar="FILE", type=Path, help="the records; of ops as a CSV too, beside them")
    return command


def _add_launches(adder: Adder) -> None:
    command = adder("kernel launches and host synchronisations of whole models, counted without a GPU")
    command.set_defaults(command=launches.run)
    _add_models_argument(command, "models", help="default: all")
    command.add_argument("--json", metavar="FILE", type=Path, help="the records")


def _add_gpu(adder: Adder) -> None:
    command = adder("all that a machine with a GPU can tell: build, tests and benchmarks, each with a log")
    command.set_defaults(command=gpu_report.run)
    command.add_argument("--out", type=Path, default=gpu_report.ROOT / "gpu-report", help="folder for logs and JSON")
    command.add_argument("--limit", type=float, default=530, help=f"seconds for all steps together; {DEFAULT}")


def _add_digits(adder: Adder) -> None:
    command = adder("accuracy against token budget, of a small LLaVA trained from scratch")
    command.set_defaults(command=digits.run)
    command.add_argument("--out", type=Path, default=digits.RESULTS, help="folder of the results")
    command.add_argument("--steps", type=positive, default=2000, help=f"of the training; {DEFAULT}")
    command.add_argument("--batch", type=positive, default=64, help=f"pictures per step; {DEFAULT}")
    command.add_argument("--seed", type=int, default=0, help=DEFAULT)
    command.add_argument("--test-pictures", type=positive, default=500, help=DEFAULT)


def _add_models_argument(command: argparse.ArgumentParser, name: str, help: str) -> None:
    command.add_argument(name, metavar="MODEL", nargs="*", type=_one_of("model", published.MODELS), help=help)


def _one_of(kind: str, names: Collection[str], shown: Collection[str] = ()) -> Callable[[str], str]:
    """Return what argparse checks an argument with; a list may be empty, which its own ``choices`` do not allow."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text}; known: {', '.join(shown or names)}")
        return text

    return check
