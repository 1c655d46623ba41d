"""Shared by the commands: where they print, and errors of one line without a stack trace."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT = "default: %(default)s"  # of an argument's help


class CommandError(Exception):
    """An error that the user can correct: the command prints it and exits with code 2."""


def positive(text: str, least: int = 1) -> int:
    """Parse the argument of a command, a positive integer that torch can count to."""
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {2**31 - 1}, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Parse the argument of a command, the seed of random numbers."""
    return positive(text, least=0)


def seconds(text: str) -> float:
    """Parse the argument of a command, a time that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


class _Console(Console):
    """A console that leaves broken pipes to `vlmfast.cli.entry`; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the error again."""
        raise BrokenPipeError


def console(columns: int = 120) -> Console:
    """Return the console: as wide as the terminal or COLUMNS, else, in a pipe or a CI log, ``columns`` wide."""
    told = sys.stdout.isatty() or os.environ.get("COLUMNS", "").strip("0").isdecimal()
    return _Console(width=None if told else columns, highlight=False)


def needed(package: str, what: str) -> None:
    """Raise a `CommandError` if a package that the command needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{what} needs {package}, which is not installed")


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    """Return the type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def table(*columns: str) -> Table:
    """Make an empty table in the style of all commands; words that are too long for a column are folded."""
    return Table(*(Column(head, overflow="fold") for head in columns), box=box.SIMPLE_HEAD, pad_edge=False)


def writable(argument: str, path: Path | None, make_folder: bool = False) -> None:
    """Raise a `CommandError` for an output path that cannot be written, before the run rather than after it."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise CommandError(f"{argument}: cannot write {path}: it is a folder")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()  # permissions do not show a read-only file system
        if is_new:
            path.unlink()
    except OSError as error:
        raise CommandError(f"{argument}: cannot write {path}: {one_line(error)}") from error


def facts() -> Table:
    """Make an empty table of names and values."""
    return Table(box=None, show_header=False, pad_edge=False)


def cpu_capabilities() -> dict[str, Any]:
    """Return torch's description of the CPU, {"avx2": True, "cpu_name": "..."}; empty if torch is too old."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def usable_device(name: str | None) -> torch.device:
    """Return the device of that name, or the default one if none is named."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device: cannot use {name}: torch sees no GPU")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # fails if the device is absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device: cannot use {name}: {one_line(error)}") from error
    return device
