"""``python -m vlmfast demo --reduce visionzip:54+10``: one prompt with all and with fewer visual tokens."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmfast import demo_answers
from vlmfast.console import CommandError, one_line, table
from vlmfast.demo_answers import answer, clocks
from vlmfast.demo_model import Subject
from vlmfast.reduce import Method, ReducedImage, overlay
from vlmfast.reduce.methods import METHODS


def parse_method(text: str) -> Method:
    """Make a method from its name and a number, or a share such as 0.1, for each argument that has no default.

    Raises:
        ArgumentTypeError: for anything but such as "visionzip:54+10".
    """
    name, _, budget = text.partition(":")
    numbers = budget.split("+")
    known = name in METHODS and len(numbers) == len(METHODS[name].required())
    if not known or not all(re.fullmatch(r"\d+|\d*\.\d+", number) for number in numbers):
        raise argparse.ArgumentTypeError(f"must be one of {usage()}, got {text!r}")
    try:
        return METHODS[name](*(float(number) if "." in number else int(number) for number in numbers))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def usage() -> str:
    """Say what `parse_method` takes."""
    forms = [f"{name}:{'+'.join(method.required()).upper()}" for name, method in sorted(METHODS.items())]
    return f"{', '.join(forms)}, each a number of tokens such as 64 or a share such as 0.1"


def compare(out: Console, subject: Subject, method: Method, picture: Any, path: Path, repeats: int) -> None:
    """Print the time to the first token and the size of the cache before and after, and draw what was kept."""
    options = {"reduce": method}
    with out.status("measuring"):
        try:
            caches = [answer(subject, 1, {}).cache]
            reduced = answer(subject, 1, options)  # also the warm-up
            pairs = clocks(subject, 1, repeats, {}, options)
        except ValueError as error:
            raise CommandError(f"--reduce: {one_line(error)}") from error
    caches.append(reduced.cache)
    image = reduced.images[0]
    shown = len(image.columns)
    cached = [cache.get_seq_length() for cache in caches]
    size = [sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for cache in caches]
    rows = table("", "all tokens", "reduced", "ratio")
    rows.add_row("visual tokens", str(image.total), str(shown), f"{image.total / max(shown, 1):.2f}")
    rows.add_row("tokens in the KV cache", *map(str, cached), f"{cached[0] / cached[1]:.2f}")
    rows.add_row("KV cache", *(f"{number / 1e6:.2f} MB" for number in size), f"{size[0] / size[1]:.2f}")
    times = demo_answers.compare([(before.first, after.first) for before, after in pairs])
    rows.add_row("first token, median (range)", *times)
    out.print(f"Fewer visual tokens, which changes the answer: {method}", markup=False, soft_wrap=True)
    out.print(rows)
    _draw(picture, image, path)
    out.print(
        f"{path}: kept tokens framed in green, the targets of merged ones in orange, the rest dimmed.", soft_wrap=True
    )


def _draw(picture: Any, image: ReducedImage, path: Path) -> None:
    """Draw over the first crop of the image, which shows all of it."""
    try:
        overlay(picture, image.kept[0], image.grid, image.merged[0]).save(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--overlay: cannot write {path}: {one_line(error)}") from error
