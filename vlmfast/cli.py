"""The command line: ``python -m vlmfast demo``, ``bench``, ``info`` and ``explain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vlmfast
from vlmfast import demo, demo_reduce, info
from vlmfast.benchmarks import command as benchmarks
from vlmfast.console import DEFAULT, DTYPES, CommandError, positive
from vlmfast.demo_model import PHOTOGRAPH


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 2 for what the user can put right; the demo has its own 1."""
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        exit_code: int | None = options.command(options)
    except CommandError as error:
        print(f"vlmfast: error: {error}", file=sys.stderr)
        return 2
    return exit_code or 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of a command, whose function is ``command`` of the result."""
    if arguments[:1] == ["bench"] and not {*arguments[1:2]} & {"-h", "--help", *benchmarks.NAMES}:
        arguments = ["bench", "ops", *arguments[1:]]  # `bench rms_norm`
    parser = argparse.ArgumentParser(prog="vlmfast", description=vlmfast.__doc__)
    parser.add_argument("--version", action="version", version=f"vlmfast {vlmfast.__version__}")

    parser.set_defaults(command=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands")
    _add_demo(commands)
    benchmarks.add(commands)

    text = "say what is installed, which backends work here, and which models can be patched"
    command = commands.add_parser("info", help=text, description=text)
    command.set_defaults(command=info.info)

    text = "say which backend would run an op, on each of its real shapes, and why the others would not"
    command = commands.add_parser(
        "explain", help=text, description=f"{text}. For a call of your own: vlmfast.explain(op, arguments)."
    )
    command.set_defaults(command=info.explain)
    command.add_argument("op", metavar="OP", help="such as rms_norm")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=DEFAULT)
    command.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    return parser.parse_args(arguments)


def _add_demo(commands: Any) -> None:
    text = "let a vision-language model describe an image before and after the patch, and compare"
    command = commands.add_parser("demo", help=text, description=f"{text}. Exit code 1 if the generated ids differ.")
    command.set_defaults(command=demo.run)
    command.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint; default: a Qwen3-VL with random weights")
    command.add_argument(
        "--image", metavar="FILE", type=Path, default=PHOTOGRAPH, help="default: a photograph that comes with vlmfast"
    )
    command.add_argument("--prompt", default="Describe this image.", help=DEFAULT)
    command.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: that of the checkpoint; without --model bfloat16, or float32 where bfloat16 is slow",
    )
    command.add_argument("--new-tokens", metavar="N", type=positive, default=16, help=DEFAULT)
    command.add_argument("--repeats", metavar="N", type=positive, default=5, help=f"timed runs; {DEFAULT}")
    command.add_argument("--layers", metavar="N", type=positive, default=30, help=f"of the random model; {DEFAULT}")
    command.add_argument(
        "--reduce",
        metavar="METHOD",
        type=demo_reduce.parse_method,
        help=f"then compare with fewer visual tokens: {demo_reduce.usage()}",
    )
    command.add_argument(
        "--overlay",
        metavar="FILE",
        type=Path,
        default=Path("reduced.png"),
        help=f"where --reduce draws which tokens were kept; {DEFAULT}",
    )
