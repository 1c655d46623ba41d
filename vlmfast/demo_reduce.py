"""``python -m vlmfast demo --reduce visionzip:54+10``: one prompt with all and with fewer visual tokens."""

from __future__ import annotations

import re
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmfast.console import CommandError, one_line, table
from vlmfast.demo_model import Subject
from vlmfast.patches import patch
from vlmfast.reduce import Method, ReducedImage, overlay
from vlmfast.reduce.methods import METHODS


def parse_method(text: str) -> Method:
    """Make a method from its name and a number, or a share such as 0.1, for each argument that has no default.

    Raises:
        ValueError: for anything but such as "visionzip:54+10".
    """
    name, _, budget = text.partition(":")
    numbers = budget.split("+")
    known = name in METHODS and len(numbers) == len(METHODS[name].required())
    if not known or not all(re.fullmatch(r"\d+|\d*\.\d+", number) for number in numbers):
        raise ValueError(f"must be one of {usage()}, got {text!r}")
    return METHODS[name](*(float(number) if "." in number else int(number) for number in numbers))


def usage() -> str:
    """Say what `parse_method` takes."""
    forms = [f"{name}:{'+'.join(method.required()).upper()}" for name, method in sorted(METHODS.items())]
    return f"{', '.join(forms)}, each a number of tokens such as 64 or a share such as 0.1"


@dataclass(frozen=True)
class Prefill:
    """One prompt up to its first token."""

    seconds: float
    cache_bytes: int
    cached_tokens: int


def compare(out: Console, subject: Subject, method: Method, picture: Any, path: Path, repeats: int) -> None:
    """Print the time to the first token and the size of the cache before and after, and draw what was kept."""
    pairs: list[tuple[Prefill, Prefill]] = []
    with out.status("measuring"):
        for turn in range(1 + repeats):
            before, _ = _prefill(subject, None)
            after, images = _prefill(subject, method)
            if turn:  # the first is the warm-up
                pairs.append((before, after))
    original, reduced = pairs[0]
    image = images[0]
    shown = len(image.columns)
    size = (original.cache_bytes, reduced.cache_bytes)
    times = [[1e3 * run.seconds for run in runs] for runs in zip(*pairs, strict=True)]
    speedup = statistics.median(before.seconds / after.seconds for before, after in pairs)
    rows = table("", "all tokens", "reduced", "ratio")
    rows.add_row("visual tokens", str(image.total), str(shown), f"{image.total / max(shown, 1):.2f}")
    cached = (original.cached_tokens, reduced.cached_tokens)
    rows.add_row("tokens in the KV cache", *map(str, cached), f"{cached[0] / cached[1]:.2f}")
    rows.add_row("KV cache", *(f"{number / 1e6:.2f} MB" for number in size), f"{size[0] / size[1]:.2f}")
    spread = (f"{statistics.median(run):.1f} ms ({min(run):.1f} to {max(run):.1f})" for run in times)
    rows.add_row("first token, median (range)", *spread, f"{speedup:.2f}")
    out.print(f"Fewer visual tokens, which changes the answer: {method}", markup=False, soft_wrap=True)
    out.print(rows)
    _draw(picture, image, path)
    out.print(
        f"{path}: kept tokens framed in green, the targets of merged ones in orange, the rest dimmed.", soft_wrap=True
    )


@torch.inference_mode()
def _prefill(subject: Subject, method: Method | None) -> tuple[Prefill, list[ReducedImage]]:
    """Answer the prompt with one token, on the patched model, with or without the reduction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a skipped site is in the report
        try:
            applied = patch(subject.model, reduce=method)
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"--reduce: {error}") from error
    with applied:
        _wait(subject)
        start = time.perf_counter()
        try:
            output = subject.model.generate(
                **subject.inputs, max_new_tokens=1, do_sample=False, num_beams=1, return_dict_in_generate=True
            )
        except ValueError as error:
            raise CommandError(f"--reduce: {one_line(error)}") from error
        _wait(subject)
        seconds = time.perf_counter() - start
        cache, images = output.past_key_values, applied.images
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    size = sum(tensor.nbytes for pair in layers for tensor in pair)
    return Prefill(seconds, size, layers[0][0].shape[-2]), images


def _wait(subject: Subject) -> None:
    if subject.model.device.type == "cuda":
        torch.cuda.synchronize(subject.model.device)


def _draw(picture: Any, image: ReducedImage, path: Path) -> None:
    """Draw over the first crop of the image, which shows all of it."""
    try:
        overlay(picture, image.kept[0], image.grid, image.merged[0]).save(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--overlay: cannot write {path}: {one_line(error)}") from error
