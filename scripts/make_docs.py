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
from vlmfast.benchmarks import report
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

Made by `make docs` from the runs in `benchmarks/results`, which `python -m vlmfast bench --json` wrote, and for whole
models `python -m vlmfast.benchmarks.models --json`: each row is of one run, medians of interleaved rounds. Rows with
a `date` of their own in the JSON are of a later run on the same machine, and replace rows whose peers had been
refused by too narrow a comparison. Below 1 the other is faster than vlmfast. "copy" moves as many bytes as the op;
in runs before 2026-11-28 it read memory that had never been written, and is up to a quarter too fast. `clone()` and
`F.linear alone` are limits too: less work than the op takes, unless the processor has no products of bfloat16 numbers,
where the op multiplies in float32.
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


Run = dict[str, Any]


def runs() -> list[dict[str, Run]]:
    """The committed runs: of each GPU's folder, then of CPUs; as far as there are these files."""
    names = ("ops", "compiled", "product", "models")
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    found = [{name: folder / f"{name}.json" for name in names} for folder in folders]
    found += [{"ops": path} for path in sorted(RESULTS.glob("cpu*.json"))]
    found += [{"models": path} for path in sorted(RESULTS.glob("models*.json"))]
    read = [{name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()} for paths in found]
    return [run for run in read if run]


def on_gpu(run: Run) -> bool:
    """Whether it ran on one."""
    return bool(run["environment"].get("kind", "cpu") != "cpu")


def figures() -> str:
    """The tables of the committed benchmark runs, each with where and when it was made."""
    gpus = [run for run in runs() if any(map(on_gpu, run.values()))]
    tables = []
    for run in [*gpus, {"ops": json.loads((RESULTS / "cpu.json").read_text())}]:
        tables += [figures_of(run["ops"], run.get("compiled"))] if "ops" in run else []
        tables += [models_of(run["models"])] if "models" in run else []
    if not gpus:
        tables.append("There is no result of a GPU yet: `make gpu-report` makes one.")
    tables.append("Beside every other peer, with all shapes that lose: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n\n".join(tables)


def figures_of(run: Run, compiled: Run | None = None) -> str:
    """One row per public op and shape; a GPU's report times torch.compile in a run of its own, ``compiled``."""
    where = run["environment"]
    place = "device time from a cold cache" if on_gpu(run) else f"{where['cpu_capability']}, {where['threads']} thread"
    dtype = statistics.mode(record["dtype"] for record in run["records"])
    lines = [
        f"Measured on {where['date'][:10]}: {where['device']} ({place}), {dtype}, torch {where['torch']},",
        f"transformers {where['transformers']}, by `python -m vlmfast bench`. Above 1 is faster than the other; the",
        "last column is the time over that of a copy of as many bytes.",
        "",
        "| op | shape | time | x transformers | x torch.compile | time / copy |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    apart = {key(record): ratios(record) for record in (compiled or {"records": []})["records"]}
    for record in run["records"]:
        ours, found = record["contenders"][0], {**apart.get(key(record), {}), **ratios(record)}
        if record["op"] not in vlmfast.__all__ or not ratios(record):
            continue
        cells = [f"`{record['op']}`", record["workload"], f"{ours['us']:.1f} us"]
        cells += [f"{found[name]:.1f}" if name in found else "" for name in ("transformers", "torch.compile")]
        cells.append(format(1 / found["copy"], ".2f") if "copy" in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def key(record: Run) -> tuple[str, str, str]:
    """What a record is of."""
    return record["op"], record["workload"], record["dtype"]


def ratios(record: Run) -> dict[str, float]:
    """How many times as long as vlmfast each other contender takes; nothing where vlmfast has no time."""
    ours, *others = record["contenders"]
    if ours["group"] != "ours" or "us" not in ours:
        return {}
    return {row["name"]: row["us"] / ours["us"] for row in others if "us" in row}


def models_of(run: Run) -> str:
    """One row for each model, mode and variant."""
    where, records = run["environment"], run["records"]
    lines = [
        f"Whole models, measured on {where['date'][:10]}: {where['device']}, {records[0]['size']} sizes with random",
        f"weights, {records[0]['dtype']}, torch {where['torch']}, transformers {where['transformers']}. Above 1 is",
        "faster than the original in the same mode; the cache is that of keys and values.",
        "",
        "| model | mode | | prefill | x original | token | x original | cache | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        cells = [record["model"], record.get("mode", ""), record["variant"]]
        for part in ("prefill", "decode"):
            time, ratio = record.get(f"{part}_ms"), record.get(f"{part}_speedup")
            note = report.prefill_note(record) if part == "prefill" else ""
            cells += ["no time" if time is None else f"{time:.1f} ms{note}", "" if ratio is None else f"{ratio:.2f}"]
        for size in (record.get("cache_bytes"), record.get("peak_bytes")):
            cells.append("" if size is None else f"{size / 1e6:.1f} MB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def benchmarks() -> str:
    """Every committed run, each row with all that it was timed against."""
    sections = []
    for run in runs():
        sections += [run_of(run[name]) for name in ("ops", "compiled", "product") if name in run]
        sections += (
            [f"## {run['models']['environment']['device']}\n\n{models_of(run['models'])}"] if "models" in run else []
        )
    return "\n".join([BENCHMARKS_HEAD, *(f"{section}\n" for section in sections)])


def run_of(run: Run) -> str:
    """One run: how many times as long as vlmfast everything else takes."""
    where = run["environment"]
    facts = [f"{name} {where[name]}" for name in ("date", "threads", "cpu_capability", "torch", "transformers")]
    lines = [f"## {where['device']}", "", ", ".join(facts), ""]
    lines += ["| op | shape | dtype | time | time over vlmfast's |", "| --- | --- | --- | ---: | --- |"]
    for record in run["records"]:
        if not (found := ratios(record)):
            continue
        others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
        cells = [f"`{record['op']}`", *key(record)[1:], f"{record['contenders'][0]['us']:.1f} us", others]
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
