"""The command line: ``python -m vlmfast demo``, ``bench``, ``info`` and ``explain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import vlmfast
from vlmfast import demo, demo_reduce, info
from vlmfast.console import CommandError
from vlmfast.demo_model import PHOTOGRAPH
from vlmfast.reduce import Method

DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 2 for what the user can put right; the demo has its own 1."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        exit_code: int = options.command(options)
    except CommandError as error:
        print(f"vlmfast: error: {error}", file=sys.stderr)
        return 2
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlmfast", description=vlmfast.__doc__)
    parser.add_argument("--version", action="version", version=f"vlmfast {vlmfast.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands")

    text = "let a vision-language model describe an image before and after the patch, and compare"
    command = commands.add_parser("demo", help=text, description=f"{text}. Exit code 1 if the generated ids differ.")
    command.set_defaults(command=_demo)
    command.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint; default: a Qwen3-VL with random weights")
    command.add_argument(
        "--image", metavar="FILE", type=Path, default=PHOTOGRAPH, help="default: a photograph that comes with vlmfast"
    )
    command.add_argument("--prompt", default="Describe this image.", help="default: %(default)s")
    command.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: that of the checkpoint; without --model bfloat16, or float32 where bfloat16 is slow",
    )
    command.add_argument("--new-tokens", metavar="N", type=_positive, default=16, help="default: %(default)s")
    command.add_argument("--repeats", metavar="N", type=_positive, default=5, help="timed runs; default: %(default)s")
    command.add_argument(
        "--layers", metavar="N", type=_positive, default=30, help="of the random model; default: %(default)s"
    )
    command.add_argument(
        "--reduce",
        metavar="METHOD",
        type=_method,
        help="then compare with fewer visual tokens: visionzip:54+10, visionzip:0.2+0.05, random:64, even:0.25",
    )
    command.add_argument(
        "--overlay",
        metavar="FILE",
        type=Path,
        default=Path("reduced.png"),
        help="where --reduce draws which tokens were kept; default: %(default)s",
    )

    text = "time the ops, and whole models, against their peers and the limits of this machine"
    command = commands.add_parser(
        "bench", help=text, description=f"{text}. Exit code 1 if a result of ours is wrong or missing."
    )
    command.set_defaults(command=_bench)
    command.add_argument("ops", metavar="OP", nargs="*", help="such as rms_norm; default: every public op")
    command.add_argument("--device", help="cpu, cuda; default: cuda where there is one")
    command.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16; for models float32 on a CPU, bfloat16 on a GPU"
    )
    command.add_argument("--threads", metavar="N", type=_positive, default=1, help="of the CPU; default: %(default)s")
    command.add_argument(
        "--peers",
        metavar="PEER",
        nargs="+",
        help="of transformers, torch, compile, liger, quack, flashinfer, none; default: those installed",
    )
    command.add_argument("--models", metavar="MODEL", nargs="*", help="whole models, such as llava-next-7b; none: all")
    command.add_argument("--html", metavar="FILE", type=Path, help="a report to look at, with JSON and CSV beside it")
    command.add_argument("--json", metavar="FILE", type=Path, help="the records, and a CSV beside them")
    command.add_argument(
        "--from", dest="source", metavar="FILE", type=Path, help="show what an earlier run wrote with --json"
    )

    text = "say what is installed, which backends work here, and which models can be patched"
    command = commands.add_parser("info", help=text, description=text)
    command.set_defaults(command=_info)

    text = "say which backend would run an op, on each of its real shapes, and why the others would not"
    command = commands.add_parser(
        "explain", help=text, description=f"{text}. For a call of your own: vlmfast.explain(op, arguments)."
    )
    command.set_defaults(command=_explain)
    command.add_argument("op", metavar="OP", help="such as rms_norm")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    command.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _method(text: str) -> Method:
    try:
        return demo_reduce.parse_method(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _demo(options: argparse.Namespace) -> int:
    choices = {name: value for name, value in vars(options).items() if name != "command"}
    return demo.run(demo.Options(**choices))


def _bench(options: argparse.Namespace) -> int:
    from vlmfast.benchmarks import bench

    choices = {name: value for name, value in vars(options).items() if name != "command"}
    return bench.run(bench.Options(**choices))


def _info(options: argparse.Namespace) -> int:
    info.info()
    return 0


def _explain(options: argparse.Namespace) -> int:
    info.explain(options.op, options.device, options.dtype)
    return 0
