"""What the commands share: where they print, and the error that is one line and no stack trace."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT = "default: %(default)s"  # of an argument's help


class CommandError(Exception):
    """Something that the user can put right; the command prints it and ends with exit code 2."""


def positive(text: str) -> int:
    """Parse the argument of a command, a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def console(columns: int = 120) -> Console:
    """Return the terminal; in a pipe or a CI log, whose width nobody knows, plain lines of up to ``columns``."""
    return Console(width=None if sys.stdout.isatty() else columns, highlight=False)


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
    """Make an empty table in the style of all commands."""
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def writable(path: Path | None) -> None:
    """Refuse now what would fail after a whole run."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {one_line(error)}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'permission denied'}")


def facts() -> Table:
    """Make an empty table of names and values."""
    return Table(box=None, show_header=False, pad_edge=False)


def cpu_capabilities() -> dict[str, Any]:
    """Return what torch knows of the CPU, {"avx2": True, "cpu_name": "..."}; nothing where torch is too old to tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def usable_device(name: str | None) -> torch.device:
    """Return the device of that name, or the one to use where none was named."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device: cannot use {name}: torch sees no GPU")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # is it there?
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device: cannot use {name}: {one_line(error)}") from error
    return device
