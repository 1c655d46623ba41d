"""``python -m vlmfast demo --compare scope:64 divprune:64``: methods to reduce visual tokens over one picture."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vlmfast.console import CommandError, one_line, table
from vlmfast.demo_answers import Answer, answer
from vlmfast.demo_model import Subject
from vlmfast.demo_reduce import crops_of
from vlmfast.reduce.caches import held_by
from vlmfast.reduce.drawing import Crop, sheet
from vlmfast.reduce.measures import Kept, kept_of_all, watched
from vlmfast.reduce.methods import LayerMethod, Method
from vlmfast.reduce.methods.even_tokens import EvenTokens
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.spelling import Reducing, every, parse, spell
from vlmfast.reduce.tokens import Selection, VisualTokens

SHARE = 0.25  # of the visual tokens, unless another is asked for

Choices = list[tuple[VisualTokens, Tensor]]


def item(text: str) -> Reducing | int | float:
    """Parse an item of ``--compare``: a method, or a number or share of tokens for every method.

    Raises:
        ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if "." not in text and value >= 1:
        return int(value)
    if 0 < value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"must be a method, a number of tokens or a share of them, got {text!r}")


@dataclass
class Row:
    """The results of one method, or of all tokens.

    Attributes:
        name: the text of the method.
        reduce: the argument of `vlmfast.patch`.
        tokens: the number of visual tokens in the language model, in its last layer if layers differ.
        kept: the measures of the choice, if the tower gives scores.
        crops: the crops to draw.
        cached: the bytes of the cache.
        seconds: the time to the first token in each round.
    """

    name: str
    reduce: Reducing | None
    tokens: int = 0
    kept: Kept | None = None
    crops: list[Crop] = field(default_factory=list)
    cached: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the patch."""
        return {} if self.reduce is None else {"reduce": self.reduce}


def compare(out: Console, subject: Subject, items: list[Any], picture: Any, path: Path, rounds: int) -> None:
    """Print a line for each method, and draw side by side what each keeps."""
    rows, refused = [Row("all tokens", None)], []
    with out.status("choosing"):
        whole = _whole(subject)
        for methods in _asked(subject, items):
            row = Row(spell(methods), methods)
            try:
                _fill(row, subject, picture, whole)
            except (ValueError, CommandError) as error:
                message = str(error).removeprefix("--reduce: ") if isinstance(error, CommandError) else one_line(error)
                refused.append(f"{row.name}: {message}")
            else:
                rows.append(row)
    if len(rows) == 1:
        raise CommandError(f"--compare: none of these methods can run here: {'; '.join(refused)}")
    rows[0].cached = _bytes(answer(subject, 1, {}))
    rows[0].tokens = subject.visual_tokens or 0
    with out.status("measuring"):
        for turn in range(rounds):
            start = turn % len(rows)
            for row in rows[start:] + rows[:start]:  # in rotating order, so that no method gains by its place
                row.seconds.append(answer(subject, 1, row.options).clock.first)
    _print(out, rows, refused, rounds)
    _draw(picture, rows[1:], path)
    out.print(f"{path}: what each keeps, as `demo --reduce` draws it.", soft_wrap=True)


def _asked(subject: Subject, items: list[Any]) -> list[Reducing]:
    """Return the wanted methods; for a budget, every registered one."""
    config = subject.model.config
    levels = len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    asked: list[Reducing] = []
    for given in items or [SHARE]:
        if not isinstance(given, (int, float)):
            asked.append(given)
            continue
        asked += every("image", given, subject.visual_tokens or 1, max(2, levels))
    return asked


def _fill(row: Row, subject: Subject, picture: Any, whole: Choices) -> None:
    """Answer once, which is also the warm-up, and note what was kept."""
    methods = row.reduce if isinstance(row.reduce, list) else [row.reduce]
    seen: list[tuple[VisualTokens, Selection]] = []
    if isinstance(methods[0], Method) and not isinstance(methods[0], SmallerImage):
        first, seen = watched(methods[0])
        methods = [first, *methods[1:]]
    answered = answer(subject, 1, {"reduce": list(methods)})
    row.cached = _bytes(answered)
    row.tokens = sum(len(image.columns) for image in answered.images)
    choices = [(tokens, selection.positions()) for tokens, selection in seen]
    row.crops = crops_of(answered.images, subject.process, picture)
    if isinstance(methods[-1], LayerMethod):
        last = _behind_the_cuts(subject, answered)
        row.tokens, choices, row.crops = len(last), [], []
        tokens = whole[0][0]
        if tokens.hidden.shape[:2] == (1, subject.visual_tokens) and tokens.grid is not None:
            # each placeholder stands for a token of the tower
            choices, row.crops = [(tokens, last[None])], [Crop(last, tokens.grid[1:])]
    if choices and all(positions.shape[1] for _, positions in choices):
        row.kept = kept_of_all(choices)


def _whole(subject: Subject) -> Choices:
    """Return the visual tokens of the picture as a method before the language model gets them."""
    method, seen = watched(EvenTokens(1.0))
    try:
        answer(subject, 1, {"reduce": method})
    except ValueError as error:
        raise CommandError(f"--compare: {one_line(error)}") from error
    return [(tokens, selection.positions()) for tokens, selection in seen]


def _behind_the_cuts(subject: Subject, answered: Answer) -> Tensor:
    """Return the placeholders of the prompt that the last layer sees."""
    ids = subject.inputs["input_ids"][0].cpu()
    config = subject.model.config
    mark = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    placeholders = (ids == mark).nonzero().flatten()
    columns = torch.arange(len(ids))
    if answered.images:  # a method before the language model has left some out
        starts = torch.tensor([0, *(image.total for image in answered.images)]).cumsum(0).tolist()
        left = [image.columns.cpu() + start for image, start in zip(answered.images, starts, strict=False)]
        columns = torch.cat([columns[ids != mark], placeholders[torch.cat(left)]]).sort().values
    held = held_by(answered.cache)
    if held:
        columns = columns[held[max(held)].index[0].cpu()]
    return torch.searchsorted(placeholders, columns[ids[columns] == mark])


def _bytes(answered: Answer) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in answered.cache.layers)


# ---- show ----


def _print(out: Console, rows: list[Row], refused: list[str], rounds: int) -> None:
    shown = table("method", "visual tokens", "attention", "coverage", "worst 5%", "first token", "speed-up", "KV cache")
    for row in rows:
        numbers = ["", "", ""]
        if row.kept is not None:
            numbers = [f"{row.kept.attention:.1%}", f"{row.kept.coverage:.3f}", f"{row.kept.worst:.3f}"]
        ratios = [before / after for before, after in zip(rows[0].seconds, row.seconds, strict=True)]
        ratio = f"{statistics.median(ratios):.2f}x" if rounds > 1 and row is not rows[0] else ""
        time = f"{1e3 * statistics.median(row.seconds):.2f} ms"
        shown.add_row(row.name, str(row.tokens), *numbers, time, ratio, f"{row.cached / 1e6:.2f} MB")
    out.print(shown)
    out.print(
        "attention: the share of it that the tower pays to what is kept. coverage: how like each token the nearest "
        "kept one is (cosine, mean over all; then over those covered least). Neither tells how many answers are right. "
        f"first token: median of {rounds} interleaved rounds.",
        soft_wrap=True,
    )
    for line in refused:
        out.print(f"left out {line}", markup=False, soft_wrap=True)


def _draw(picture: Any, rows: list[Row], path: Path) -> None:
    """Write a sheet of the pictures, each with its method below."""
    panels = [(f"{row.name}: {row.tokens} tokens", row.crops) for row in rows if row.crops]
    try:
        (sheet(picture, panels) if panels else picture).save(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--overlay: cannot write {path}: {one_line(error)}") from error
