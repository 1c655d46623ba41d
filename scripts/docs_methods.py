"""Make docs/methods.md from the register of methods, and Markdown of docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vlmfast.reduce.methods import METHODS, LayerMethod, Named, VideoMethod
from vlmfast.reduce.spelling import at_budget, written
from vlmfast.reduce.text import Text
from vlmfast.reduce.tokens import VisualTokens

HEAD = """# Methods

Made by `make docs` from the register of methods. Each is a class of `vlmfast`: `vlmfast.patch(model,
reduce=vlmfast.SCOPE(keep=64))`. On a command line, in a configuration or in a request it is text, `scope:64`, with
shares of the visual tokens written as 0.1, and one method behind another with a plus sign, `scope:0.3+fastv:8:0.5`.
Which of them loses least: [choosing.md](choosing.md). How they are used, and how to write one:
[token_reduction.md](token_reduction.md).
"""
KINDS = {
    "before": ("Before the language model", "They choose from the tokens that a tower made, image by image."),
    "videos": ("For videos", "They see all frames of a video, and choose where in it tokens are kept."),
    "inside": ("Between layers of the language model", "The first layers see all tokens, those behind a cut fewer."),
}
READS = {  # what `VisualTokens` may be asked for
    "pixels": "pixels",
    "hidden": "rows of the tower",
    "scores": "attention in the tower",
    "metric": "keys of the tower",
    "features": "tokens as the language model sees them",
    "text": "words of the question",
    "grid": "places in the picture",
}
ORDER = list(READS)
SECTION = re.compile(r"^(Args|Returns|Raises|Source|Attributes):$", re.MULTILINE)
FIELD = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Watched(VisualTokens):
    """Visual tokens that note what they are asked for."""

    asked: set[str]

    def __getattribute__(self, name: str) -> Any:
        """Note the name."""
        if name in ("hidden", "grid"):
            object.__getattribute__(self, "asked").add(name)
        return super().__getattribute__(name)

    batch, count, device = 1, 16, torch.device("cpu")  # which are no question about the rows


def read(method: type[Named]) -> list[str]:
    """Return what a method asks for when it chooses."""
    if issubclass(method, LayerMethod):
        return ["attention of the words of the question" if method.reads_text else "attention of the last token"]
    made = at_budget(method, 6, 16, 2)
    if made is None:
        return ["what its arguments say"]
    rows, asked = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)), set()

    def give(name: str, value: Any) -> Any:
        asked.add(name)
        return value

    text = Text(rows[:, :5], torch.ones(1, 5, dtype=torch.bool))
    values = {"scores": rows[..., 0].abs(), "metric": rows, "features": rows, "pixels": rows, "text": text}
    given: dict[str, Any] = {name: partial(give, name, value) for name, value in values.items()}
    frames = 4 if issubclass(method, VideoMethod) else 1
    tokens = Watched(hidden=rows, grid=(frames, 4, 4 // frames), crops=frames, total=16, asked=asked, **given)
    asked.clear()  # of what making them asked for
    (made.select_videos if frames > 1 else made.select)(tokens)
    return [READS[name] for name in sorted(asked, key=ORDER.index)]


def signature(name: str, function: Callable[..., Any]) -> str:
    """Return the signature as in source code, without the quotes that `inspect` puts around annotations."""
    return name + re.sub(r"(: |-> )(['\"])(.*?)\2(?=,|\)| =|$)", r"\1\3", str(inspect.signature(function)))


def kind(method: type[Named]) -> str:
    """Return where a method belongs."""
    if issubclass(method, LayerMethod):
        return "inside"
    return "videos" if issubclass(method, VideoMethod) else "before"


def page() -> str:
    """Make docs/methods.md: a table of all, and a section for each."""
    rows, sections = [], {name: [f"## {title}", says] for name, (title, says) in KINDS.items()}
    for method in sorted(METHODS.values(), key=lambda method: method.__name__.lower()):
        first, _, rest = (inspect.getdoc(method) or "").partition("\n")
        called = f"[`{method.__name__}`](#{method.__name__.lower()})"
        rows.append(f"| {called} | `{written(method)}` | {KINDS[kind(method)][0].lower()} | {first} |")
        facts = [
            f"- In Python: `vlmfast.{signature(method.__name__, method).removesuffix(' -> None')}`",
            f"- As text: `{written(method)}`",
            f"- Reduces: {' and '.join(f'{what}s' for what in method.takes)}",
            f"- Reads: {', '.join(read(method)) or 'nothing'}",
        ]
        sections[kind(method)] += [f"### {method.__name__}", first, "\n".join(facts), markdown(rest)]
    table = "\n".join(["| method | as text | where | what it does |", "| --- | --- | --- | --- |", *rows])
    return "\n\n".join([HEAD.rstrip(), table, *(part for parts in sections.values() for part in parts if part)]) + "\n"


def markdown(text: str) -> str:
    """Make Markdown of a docstring behind its first line: paragraphs, and a list for each section."""
    text = text.strip().replace("``", "`")
    head, *found = SECTION.split(textwrap.dedent(text))
    parts = [head.strip()]
    for name, body in zip(found[::2], found[1::2], strict=True):
        body = textwrap.dedent(body.strip("\n"))
        if name in ("Args", "Attributes"):
            fields = FIELD.split(body)
            items = zip(fields[1::2], fields[2::2], strict=True)
            parts.append(f"**{name}**\n\n" + "\n".join(f"- `{key}`: {_line(value)}" for key, value in items))
        else:
            parts.append(f"**{name}**: {_line(body)}")
    return "\n\n".join(part for part in parts if part)


def _line(text: str) -> str:
    return " ".join(text.split())
