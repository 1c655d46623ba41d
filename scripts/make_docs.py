"""Write docs/ops.md from the docstrings of the ops, or with --check fail where it is stale."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import vlmfast
from vlmfast.registry import OPS

PAGE = Path(__file__).parents[1] / "docs" / "ops.md"
HEAD = """# Ops

Made by `make docs` from the docstrings in `vlmfast/ops/`. Every op is a function of `vlmfast`, differentiable, one
node under `torch.compile`, and returns new contiguous tensors.
"""


def signature(name: str) -> str:
    """The function's head as one would write it."""
    found = inspect.signature(getattr(vlmfast, name))
    defaults = {p.name: "" if p.default is p.empty else f" = {p.default!r}" for p in found.parameters.values()}
    arguments = [f"{p.name}: {p.annotation}{defaults[p.name]}" for p in found.parameters.values()]
    return f"{name}({', '.join(arguments)}) -> {found.return_annotation}"


def page() -> str:
    """The whole page."""
    sections = []
    for name in (n for n in OPS if n in vlmfast.__all__):
        text = inspect.getdoc(getattr(vlmfast, name))
        sections.append(f"## `{name}`\n\n```python\n{signature(name)}\n```\n\n```text\n{text}\n```\n")
    return "\n".join([HEAD, *sections])


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text() != text:
            print(f"{PAGE.name} is stale: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
