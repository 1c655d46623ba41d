"""``python -m vlmfast demo --reduce visionzip:54+10``: one prompt with all and with fewer visual tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmfast import demo_answers
from vlmfast.console import CommandError, one_line, table, writable
from vlmfast.demo_answers import answer, clocks
from vlmfast.demo_crops import find_boxes
from vlmfast.demo_model import Subject
from vlmfast.reduce import ReducedImage
from vlmfast.reduce.drawing import Crop, draw
from vlmfast.reduce.spelling import Reducing, parse, spell


def parse_method(text: str) -> Reducing:
    """Parse methods as `vlmfast.reduce.spelling.parse` does, for argparse.

    Raises:
        ArgumentTypeError: for a text that it refuses.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def compare(out: Console, subject: Subject, method: Reducing, picture: Any, path: Path, repeats: int) -> None:
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
    total = sum(image.total for image in reduced.images)  # some models take the tiles of a picture as images
    shown = sum(len(image.columns) for image in reduced.images)
    # the columns of a layer, or their mean if layers differ
    cached = [sum(layer.get_seq_length() for layer in cache.layers) / len(cache.layers) for cache in caches]
    size = [sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for cache in caches]
    rows = table("", "all tokens", "reduced", "ratio")
    if reduced.images:
        rows.add_row("visual tokens", str(total), str(shown), f"{total / max(shown, 1):.2f}")
    tokens = [f"{number:.1f}".removesuffix(".0") for number in cached]
    rows.add_row("tokens in the KV cache", *tokens, f"{cached[0] / cached[1]:.2f}")
    rows.add_row("KV cache", *(f"{number / 1e6:.2f} MB" for number in size), f"{size[0] / size[1]:.2f}")
    times = demo_answers.compare([(before.first, after.first) for before, after in pairs])
    rows.add_row("first token, median (range)", *times)
    named = method if not isinstance(method, list) else spell(method)
    out.print(f"Fewer visual tokens, which changes the answer: {named}", markup=False, soft_wrap=True)
    out.print(rows)
    if not reduced.images:
        out.print(f"{reduced.report}; nothing is drawn, as other layers see other tokens", markup=False, soft_wrap=True)
        return
    _draw(picture, reduced.images, subject.process, path)
    out.print(
        f"{path}: kept tokens framed in green, the targets of merged ones in orange, the rest dimmed.", soft_wrap=True
    )


def check_overlay(path: Path) -> None:
    """Refuse a file name whose format Pillow cannot write."""
    from PIL import Image

    writable("--overlay", path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise CommandError(f"--overlay: cannot write {path}: a picture's name ends as in .png or .jpg")


def _draw(picture: Any, images: list[ReducedImage], process: Callable[[Any], Any] | None, path: Path) -> None:
    """Draw each crop at its place in the picture; crops that do not overlap share one copy."""
    crops = crops_of(images, process, picture)
    try:
        draw(picture, crops).save(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--overlay: cannot write {path}: {one_line(error)}") from error


def crops_of(images: list[ReducedImage], process: Callable[[Any], Any] | None, picture: Any) -> list[Crop]:
    """Return the crops to draw for a prompt that shows one picture, each with its box."""
    crops = [
        Crop(kept, image.grid, merged)
        for image in images
        for kept, merged in zip(image.kept, image.merged, strict=True)
    ]
    if process is not None and (boxes := find_boxes(process, picture.size)) is not None:
        crops = [crop._replace(box=box) for crop, box in zip(crops, boxes, strict=False) if box is not None]
    return crops
