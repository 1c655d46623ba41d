"""The command line: ``python -m vlmfast demo``, ``bench``, ``info``, ``explain`` and ``scan``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vlmfast
from vlmfast import demo, demo_compare, demo_reduce, info
from vlmfast.backends import loader
from vlmfast.benchmarks import command as benchmarks
from vlmfast.console import DEFAULT, DTYPES, CommandError, one_line, positive
from vlmfast.demo_model import PHOTOGRAPH
from vlmfast.patches import scan
from vlmfast.reduce.spelling import usage
from vlmfast.registry import order


def entry(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this process and return its exit code.

    0: it is done. 1: it is done, and what it compares differs. 2, with one line: it is not done, for a reason outside
    of vlmfast: an argument, a file, Ctrl-C, a pipe that nobody reads any more. A fault of vlmfast is an exception.
    """
    try:
        try:
            return main(arguments)
        finally:
            sys.stdout.flush()  # not at exit, where Python itself would speak of a closed pipe
    except KeyboardInterrupt:
        reason = "stopped by Ctrl-C"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        reason = "stopped, because nobody reads the output any more"
    except OSError as error:
        reason = one_line(error)
    return _refuse(reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as `entry` does, to which it leaves what happens to the process."""
    options = parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        for name in order.get():
            loader(name)
    except ValueError as error:  # of VLMFAST_BACKEND
        return _refuse(str(error))
    try:
        exit_code: int | None = options.command(options)
    except CommandError as error:
        return _refuse(str(error))
    return exit_code or 0


def _refuse(reason: str) -> int:
    print(f"vlmfast: error: {reason}", file=sys.stderr)
    return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of a command, whose function is ``command`` of the result."""
    if arguments[:1] == ["bench"] and not {*arguments[1:2]} & {"-h", "--help", *benchmarks.NAMES}:
        arguments = ["bench", "ops", *arguments[1:]]  # `bench rms_norm`
    codes = (
        "Exit codes: 0, done; 1, done, and what is compared differs; 2, not done, for a reason that one line tells: an "
        "argument, a file, Ctrl-C, a pipe that nobody reads."
    )
    parser = argparse.ArgumentParser(prog="vlmfast", description=vlmfast.__doc__, epilog=codes)
    parser.add_argument("--version", action="version", version=f"vlmfast {vlmfast.__version__}")

    parser.set_defaults(command=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands")
    _add_demo(commands)
    benchmarks.add(commands)

    text = "say what is installed, and which backends work here"
    command = commands.add_parser("info", help=text, description=text)
    command.add_argument("--all", action="store_true", help="also which backend runs each op, and what can be patched")
    command.set_defaults(command=info.info)

    text = "say which backend would run an op, on each of its real shapes, and why the others would not"
    command = commands.add_parser(
        "explain", help=text, description=f"{text}. For a call of your own: vlmfast.explain(op, arguments)."
    )
    command.set_defaults(command=info.explain)
    command.add_argument("op", metavar="OP", help="such as rms_norm")
    command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=DEFAULT)
    command.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")

    text = "say which methods of the installed transformers are known, and which are only like them"
    command = commands.add_parser("scan", help=text, description=text)
    command.set_defaults(command=scan.run)
    what = "write there instead what `make docs` makes docs/families.md of, beside what the file says of other releases"
    command.add_argument("file", metavar="PATH.json", nargs="?", type=Path, help=what)
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
    command.add_argument("--layers", metavar="N", type=positive, help="of the random model; default: 30")
    command.add_argument(
        "--reduce",
        metavar="METHOD",
        type=demo_reduce.parse_method,
        help=f"then compare with fewer visual tokens: {usage()}",
    )
    command.add_argument(
        "--compare",
        metavar="METHOD",
        nargs="*",
        type=demo_compare.item,
        help="instead, put methods side by side, written as for --reduce: what each keeps, time and cache, and a "
        "picture. A number or share in place of a method: every method that is known, with so many tokens; default: "
        f"{demo_compare.SHARE}",
    )
    command.add_argument(
        "--overlay",
        metavar="FILE",
        type=Path,
        help="where --reduce or --compare draws which tokens were kept; default: reduced.png, compared.png",
    )
