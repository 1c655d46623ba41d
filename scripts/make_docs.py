"""Write docs/ops.md from the docstrings and the README's figures from benchmarks/results; --check: fail if stale."""

from __future__ import annotations

import inspect
import json
import operator
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vlmfast.compat
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ops.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- figures: made by `make docs` -->\n).*?(<!-- end of figures -->)", re.DOTALL)
HEAD = """# Ops

Made by `make docs` from the docstrings. Every op is a function of `vlmfast`, differentiable in its floating-point
tensors, one node under `torch.compile`, and returns new contiguous tensors.
"""
AROUND = "# Around the ops\n"
BENCHMARKS_HEAD = """# Benchmarks

Made by `make docs` from the runs in `benchmarks/results`, which `python -m vlmfast bench --json` wrote: each row is
of one run, medians of interleaved rounds. Rows with a `date` of their own in the JSON are of a later run on the
same machine, and replace rows whose peers had been refused by too narrow a comparison. Below 1 the other is faster
than vlmfast. "copy" moves as many bytes as the op; `clone()` and `F.linear alone` are limits too: less work than
the op takes, unless the processor has no products of bfloat16 numbers, where the op multiplies in float32.
"""


class Bare(str):
    """An annotation that `inspect` does not put into quotes."""

    __repr__ = str.__str__


def signature(name: str, function: Callable[..., Any]) -> str:
    """The function's head as one would write it."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=Bare(p.annotation)) for p in found.parameters.values()]
    return f"{name}{found.replace(parameters=parameters, return_annotation=Bare(found.return_annotation))}"


def page() -> str:
    """The whole page."""
    around = [name for name in vlmfast.__all__ if name not in OPS and inspect.isfunction(getattr(vlmfast, name))]
    compat = [f"compat.{project}.patch" for project in vlmfast.compat.__all__]
    ops = [name for name in OPS if name in vlmfast.__all__]
    return "\n".join([HEAD, *map(section, ops), AROUND, *map(section, [*around, *compat])])


def section(name: str) -> str:
    """What the documentation says of one public function."""
    function = operator.attrgetter(name)(vlmfast)
    text = inspect.getdoc(function)
    return f"## `{name}`\n\n```python\n{signature(name, function)}\n```\n\n```text\n{text}\n```\n"


def figures() -> str:
    """The tables of the committed benchmark runs, each with where and when it was made."""
    gpus = sorted(RESULTS.glob("*/ops.json"))
    tables = [figures_of(json.loads(path.read_text())) for path in (*gpus, RESULTS / "cpu.json")]
    if not gpus:
        tables.append("There is no result of a GPU yet: `make gpu-report` makes one.")
    tables.append("Beside every other peer, with all shapes that lose: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n\n".join(tables)


def figures_of(run: dict[str, Any]) -> str:
    """One row per public op and shape."""
    where = run["environment"]
    on_gpu = where.get("kind", "cpu") != "cpu"
    place = "device time from a cold cache" if on_gpu else f"{where['cpu_capability']}, {where['threads']} thread"
    dtype = statistics.mode(record["dtype"] for record in run["records"])
    lines = [
        f"Measured on {where['date'][:10]}: {where['device']} ({place}), {dtype}, torch {where['torch']},",
        f"transformers {where['transformers']}, by `python -m vlmfast bench`. Above 1 is faster than the other; the",
        "last column is the time over that of a copy of as many bytes.",
        "",
        "| op | shape | time | x transformers | x torch.compile | time / copy |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for record in run["records"]:
        ours = record["contenders"][0]
        if record["op"] not in vlmfast.__all__ or ours["group"] != "ours" or "us" not in ours:
            continue
        times = {row["name"]: row["us"] for row in record["contenders"] if "us" in row}
        cells = [f"`{record['op']}`", record["workload"], f"{ours['us']:.1f} us"]
        cells += [
            f"{times[name] / ours['us']:.1f}" if name in times else "" for name in ("transformers", "torch.compile")
        ]
        lines.append(f"| {' | '.join([*cells, format(ours['us'] / times['copy'], '.2f')])} |")
    return "\n".join(lines)


def benchmarks() -> str:
    """Every committed run, each row with all that it was timed against."""
    paths = sorted(RESULTS.glob("*/ops.json")) + sorted(RESULTS.glob("cpu*.json"))
    return "\n".join([BENCHMARKS_HEAD, *(f"{run_of(json.loads(path.read_text()))}\n" for path in paths)])


def run_of(run: dict[str, Any]) -> str:
    """One run: how many times as long as vlmfast everything else takes."""
    where = run["environment"]
    facts = [f"{name} {where[name]}" for name in ("date", "threads", "cpu_capability", "torch", "transformers")]
    lines = [f"## {where['device']}", "", ", ".join(facts), ""]
    lines += ["| op | shape | dtype | time | time over vlmfast's |", "| --- | --- | --- | ---: | --- |"]
    for record in run["records"]:
        ours, *others = record["contenders"]
        if ours["group"] != "ours" or "us" not in ours:
            continue
        ratios = [f"{row['name']} {row['us'] / ours['us']:.2f}" for row in others if "us" in row]
        cells = [f"`{record['op']}`", record["workload"], record["dtype"], f"{ours['us']:.1f} us", ", ".join(ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Write the files, or compare them."""
    readme = MARKED.sub(lambda match: f"{match[1]}{figures()}\n{match[2]}", README.read_text())
    wanted = {PAGE: page(), README: readme, ROOT / "docs" / "benchmarks.md": benchmarks()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
