"""Write the generated docs: from docstrings, the table of bodies and benchmarks/results. --check: fail if stale."""

from __future__ import annotations

import inspect
import json
import operator
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import vlmfast.compat
from scripts import docs_methods
from vlmfast.benchmarks import coverage, digits, gpu_report, predicted, report
from vlmfast.patches.bodies import BODIES, Body
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ops.md"
STUB = ROOT / "vlmfast" / "__init__.pyi"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
CHOOSING, TRAINING = ROOT / "docs" / "choosing.md", ROOT / "docs" / "training.md"
HEAD = """# Ops

Made by `make docs` from the docstrings. Every op is a function of `vlmfast`, differentiable in its floating-point
tensors, and returns new contiguous tensors. In a graph of `torch.compile` it is one node, or its definition on the
devices that its entry names; exporters get its definition.
"""
AROUND = "# Around the ops\n"
BENCHMARKS_HEAD = """# Benchmarks

Made by `make docs` from the runs in `benchmarks/results`, which `python -m vlmfast bench --json FILE` wrote. Each row
shows the median times of interleaved rounds in one run. Rows with a `date` of their own in the JSON are from a later
run on the same machine, and replace rows whose peers had been refused by too narrow a comparison.

The last column is the time of each peer or limit divided by that of vlmfast: below 1, the other is faster. "copy" moves
as many bytes as the op; in runs before 2026-11-28 it read memory that had never been written, and is up to a quarter
too fast. `clone()` and `F.linear alone` are limits too: they do less work than the op. The exception is a processor
without bfloat16 multiplication, on which the op multiplies in float32. "torch.compile" is the definition, compiled
alone. Rows "in a graph" time eight layers of residual, norm and scale in one compiled graph; transformers' own layers
are compiled too. "PyTorch" and "the row in PyTorch" in runs before 2026-11-29 are slower than PyTorch has to be.
"""
PREDICTED_HEAD = """# Predicted for GPUs

Made by `make docs` from `benchmarks/results/static.json`, which `make static` writes without a GPU.

**{explained}.** A bound is no forecast: what it leaves out makes a kernel slower.
[benchmarks/predicted.py](../benchmarks/predicted.py) has the model, and `static.json` each kernel of a call.

- "100 %" claims nothing but that a copy is not beaten. With "in flight" or "programs" behind it, fewer bytes are in
  flight than CUB has found necessary (A100 16 KiB per multiprocessor, H100 32, H200 48, B200 64): some of the bandwidth
  is lost, and nothing here tells how much.
- Only Triton kernels are in the table. The CUDA kernels, which NVIDIA GPUs run where they are built, are not.
- Calls of less than 1 MB are left out, in which the time of a launch is all there is, as are those of more than 48 MiB
  and the ops that multiply matrices.
- {measured}
"""
MEASURED = (
    "The columns on the right are measured: copy over Triton kernels, from the runs in [benchmarks.md](benchmarks.md)."
)
UNMEASURED = (
    "No GPU was measured yet. Where there are results of `make gpu-report`, a column has them beside these bounds."
)
README_ROWS = {
    ("rms_norm", "600x2048"),
    ("add_rms_norm", "600x2048"),
    ("place_embeddings", "1x600x2048"),
    ("pixel_shuffle", "1 x InternViT-300M"),
    ("visionzip", "5x576x1024"),
}
README_MODELS = ("prefill_ms", "prefill_speedup", "decode_ms", "decode_speedup", "cache_bytes", "peak_bytes")

TYPES_HEAD = """# Models

Made by `make docs` from docs/families.json, which `python -m vlmfast scan docs/families.json` writes under each
release of transformers. Every type of model that transformers maps to image-text-to-text is built from its default
configuration. Its table says for each method and release which function of vlmfast replaces it, or why none does;
"unknown" is a norm or a mask whose body vlmfast does not know. A checkpoint may bring another language model or vision
tower than the default configuration: what is known in it is replaced as well. In types "patched as a whole" every norm
and mask is replaced."""


def page() -> str:
    """Make docs/ops.md."""
    around = [name for name in vlmfast.__all__ if name not in OPS and inspect.isfunction(getattr(vlmfast, name))]
    compat = [f"compat.{project}.patch" for project in vlmfast.compat.__all__]
    ops = [name for name in OPS if name in vlmfast.__all__]
    ops.sort(key=lambda name: OPS[name].reference.__module__)  # by family, independent of the order of imports
    return "\n".join([HEAD, *map(section, ops), AROUND, *map(section, [*around, *compat])])


def section(name: str) -> str:
    """Make the section of one public function."""
    function = operator.attrgetter(name)(vlmfast)
    text = inspect.getdoc(function)
    inlined = OPS[name].inlined if name in OPS else ()
    more = f"\nA compiled graph has its definition on: {', '.join(inlined)}.\n" if inlined else ""
    first, _, rest = text.partition("\n")
    parts = (
        f"## `{name}`",
        f"```python\n{broken(docs_methods.signature(name, function))}\n```",
        first,
        docs_methods.markdown(rest),
    )
    return "\n\n".join(part for part in parts if part) + f"\n{more}"


def broken(text: str, width: int = 88) -> str:
    """Put the arguments of a long signature on lines of their own."""
    if len(text) <= width:
        return text
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter == ")":
            parts.append("")
        parts[-1] += letter
        if depth == 1 and letter in "(,":
            parts.append("")
    first, *arguments, last = (part.strip() for part in parts)
    return "\n".join([first, *(f"    {argument.removesuffix(',')}," for argument in arguments), last])


Run = dict[str, Any]
KEYS = {"records": ("op", "workload", "dtype"), "models": ("model", "mode", "variant")}


def runs() -> list[dict[str, Run]]:
    """Read the committed runs that exist: the folder of each GPU, then the files of CPUs."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    found = [{name: folder / f"{name}.json" for name in gpu_report.REPORTS} for folder in folders]
    found += [{"ops": path} for path in sorted(RESULTS.glob("cpu*.json"))]
    found += [{"models": path} for path in sorted(RESULTS.glob("models*.json"))]
    read = [{name: report.read(path) for name, path in paths.items() if path.exists()} for paths in found]
    return [joined(run) for run in read if run]


def joined(run: dict[str, Run]) -> dict[str, Run]:
    """Join what `make gpu-report` measures first, in files of its own, with the files of all ops and models."""
    for whole, parts in (("ops", ("ops", "deciding")), ("models", ("decode", "prefill", "models"))):
        there = [run.pop(part) for part in parts if part in run]
        if there:
            kind = "records" if whole == "ops" else "models"
            once: dict[tuple[Any, ...], Run] = {}
            for record in (record for one in there for record in one[kind]):
                once.setdefault(tuple(record.get(name) for name in KEYS[kind]), record)
            run[whole] = {**there[0], kind: list(once.values())}
    return run


def on_gpu(run: Run) -> bool:
    """Tell whether a run was on a GPU."""
    return bool(run["environment"].get("kind", "cpu") != "cpu")


def table(heads: tuple[str, ...], left: int, rows: list[list[str]]) -> str:
    """Make a Markdown table whose first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ([*heads], rule, *rows))


def figures() -> str:
    """Make the README's tables: a few rows of the committed runs, with the device and date of each."""
    gpus = [run for run in runs() if any(map(on_gpu, run.values()))]
    tables = []
    for run in [*gpus, {"ops": report.read(RESULTS / "cpu.json")}]:
        tables += [figures_of(run["ops"], run.get("compiled", run["ops"]))] if "ops" in run else []
        tables += [models_of(run["models"])] if "models" in run else []
    if not gpus:
        tables.append("There is no result of a GPU yet: `make gpu-report` makes one.")
    tables.append("All ops, shapes and peers, with those that lose: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n\n".join(tables)


def figures_of(run: Run, compiled: Run) -> str:
    """Make the README's table of ops; on GPUs, torch.compile is timed in another run, ``compiled``."""
    where = run["environment"]
    place = "device time from a cold cache" if on_gpu(run) else f"{where['cpu_capability']}, {where['threads']} thread"
    dtype = statistics.mode(record["dtype"] for record in run["records"])
    apart = {key(record): ratios(record) for record in compiled["records"]}
    rows = []
    for record in run["records"]:
        if key(record)[:2] in README_ROWS and (found := ratios(record)):
            found = apart.get(key(record), {}) | found
            cells = [f"`{record['op']}`", record["workload"], f"{record['contenders'][0]['us']:.1f} us"]
            peers = [found[name] for name in OPS[record["op"]].cases.peers if name in found]
            others = found.get("transformers"), min(peers, default=None), found.get("torch.compile")
            cells += ["" if ratio is None else f"{ratio:.1f}" for ratio in others]
            rows.append([*cells, format(1 / found["copy"], ".2f") if "copy" in found else ""])
    return (
        f"Measured on {where['date'][:10]}: {where['device']} ({place}), {dtype}, torch {where['torch']},\n"
        f"transformers {where['transformers']}, by `python -m vlmfast bench`. Above 1 is faster than the other; the\n"
        'last column is the time over that of a copy of as many bytes. "x PyTorch" compares\n'
        'with the fastest plain PyTorch that was found, "x torch.compile" with the definition,\n'
        "compiled by itself. In a compiled model norms are left to Inductor.\n\n"
    ) + table(("op", "shape", "time", "x transformers", "x PyTorch", "x torch.compile", "time / copy"), 2, rows)


def key(record: Run) -> tuple[str, str, str]:
    """Return op, workload and dtype of a record."""
    return record["op"], record["workload"], record["dtype"]


def ratios(record: Run) -> dict[str, float]:
    """Map each other contender to its time divided by vlmfast's; empty where vlmfast has no time."""
    ours, *others = record["contenders"]
    if ours["group"] != "ours" or "us" not in ours:
        return {}
    return {row["name"]: row["us"] / ours["us"] for row in others if "us" in row}


def models_of(run: Run) -> str:
    """Make a table with one row per model, mode and variant."""
    where, records = run["environment"], run["models"]
    rows = []
    for record in records:
        cells = report.cells(report.MODEL_COLUMNS, README_MODELS, record)
        rows.append([record["model"], record.get("mode", ""), record["variant"], cells[0] or "no time", *cells[1:]])
    heads = "model", "mode", "", *(report.MODEL_COLUMNS[name][0] for name in README_MODELS)
    return (
        f"Whole models, measured on {where['date'][:10]}: {where['device']}, {records[0]['size']} sizes with random\n"
        f"weights, {records[0]['dtype']}, torch {where['torch']}, transformers {where['transformers']}. Above 1 is\n"
        "faster than the original in the same mode; KV is the cache of keys and values.\n\n"
    ) + table(heads, 3, rows)


def benchmarks() -> str:
    """Make docs/benchmarks.md: every committed run, with all contenders of each row."""
    sections = []
    for run in runs():
        sections += [run_of(run[name]) for name in ("ops", "compiled", "matmul") if name in run]
        if "models" in run:
            sections.append(f"## {run['models']['environment']['device']}\n\n{models_of(run['models'])}")
    return "\n".join([BENCHMARKS_HEAD, *(f"{section}\n" for section in sections)])


def run_of(run: Run) -> str:
    """Make the section of one run of ops: the time of each other contender divided by vlmfast's."""
    where, rows = run["environment"], []
    facts = ", ".join(
        f"{name} {where[name]}" for name in ("date", "threads", "cpu_capability", "torch", "transformers")
    )
    for record in run["records"]:
        if found := ratios(record):
            others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
            rows.append([f"`{record['op']}`", *key(record)[1:], f"{record['contenders'][0]['us']:.1f} us", others])
    shown = table(("op", "shape", "dtype", "time", "time over vlmfast's"), 5, rows)
    return f"## {where['device']}\n\n{facts}\n\n{shown}"


def predicted_page() -> str:
    """Make docs/predicted.md: the bounds and, where a GPU has committed runs, what was measured."""
    heads, rows = predicted.rows(run["ops"] for run in runs() if "ops" in run)
    measured = MEASURED if heads[-1].endswith("measured") else UNMEASURED
    shown = table(tuple(heads), 2, [[f"`{op}`", *cells] for op, *cells in rows])
    return f"{PREDICTED_HEAD.format(explained=predicted.EXPLAINED, measured=measured)}\n{shown}\n"


def stub() -> str:
    """Make vlmfast/__init__.pyi, since type checkers cannot see the names that `vlmfast` finds by folder on import."""
    found = sorted((getattr(getattr(vlmfast, name), "__module__", "vlmfast"), name) for name in vlmfast.__all__)
    lines = [f"from {origin} import {name} as {name}" for origin, name in found]
    return "\n".join(["# Made by `make docs`.", *lines, "", "__all__: list[str]", "__version__: str", ""])


def coverage_table() -> str:
    """Make the table of what methods keep of photographs."""
    head, rows = coverage.rows_of(json.loads((RESULTS / "coverage.json").read_text()))
    return table(tuple(head), 1, rows)


def digits_tables() -> str:
    """Make the tables of right answers about digits."""
    tables = [digits.rows_of(found) for found in json.loads((RESULTS / "digits.json").read_text())["tasks"]]
    return "\n\n".join(table(tuple(head), 1, rows) for head, rows in tables)


def projector_table() -> str:
    """Make the table of what tuning the projector wins back."""
    rows = []
    for record in json.loads((RESULTS / "projector.json").read_text())["records"]:
        gains = [after - before for before, after in zip(record["before"], record["after"], strict=True)]
        shares = [digits.spread(record[name]) for name in ("all tokens", "before", "after")]
        rows.append([f"{record['tokens']} of 64", *shares, digits.spread(gains)])
    return table(("tokens", "all tokens", "reduced", "projector tuned", "gain"), 1, rows)


def model_types() -> str:
    """Make docs/families.md: which methods are replaced in each model type and release, and why others are not."""
    seen = json.loads((ROOT / "docs" / "families.json").read_text())
    known = {body.key: body for body in BODIES}
    verdicts = {
        version: {site: _verdict(known.get(digest)) for digest, sites in found["bodies"].items() for site in sites}
        for version, found in seen.items()
    }
    counts, sections = [], []
    for version, found in seen.items():
        models = [sites for sites in found["types"].values() if isinstance(sites, list)]
        built = [[verdicts[version][site] for site in sites] for sites in models]
        whole = [states for states in built if states and all(state.startswith("`") for state in states)]
        some = [states for states in built if any(state.startswith("`") for state in states)]
        cells = [version, *map(str, map(len, (found["types"], built, some, whole)))]
        for kind in ("RMSNorm", "get_placeholder_mask"):
            states = [state for site, state in verdicts[version].items() if kind in site]
            cells.append(f"{sum(state.startswith('`') for state in states)} of {len(states)}")
        counts.append(cells)
    for model_type in sorted({name for found in seen.values() for name in found["types"]}):
        sites_of = {version: _sites(model_type, found, verdicts[version]) for version, found in seen.items()}
        names = sorted({site for sites in sites_of.values() for site in sites})
        rows = [
            [f"`{site}`", *(verdicts[version][site] if site in sites_of[version] else "" for version in seen)]
            for site in names
        ]
        partly = [version for version, found in seen.items() if isinstance(found["types"].get(model_type), str)]
        absent = [version for version, found in seen.items() if model_type not in found["types"]]
        notes = [f"Not in {', '.join(absent)}."] if absent else []
        if partly:
            notes.append(
                f"In {', '.join(partly)} the default configuration builds no model: only the type's own file is shown."
            )
        shown = table(("method", *seen), len(seen) + 1, rows) if rows else "It has no RMSNorm and no placeholder mask."
        sections.append("\n\n".join([f"## {model_type}", *([" ".join(notes)] if notes else []), shown]))
    heads = (
        "transformers",
        "types",
        "built",
        "patched",
        "patched as a whole",
        "RMSNorm classes",
        "placeholder methods",
    )
    return "\n\n".join([TYPES_HEAD, table(heads, 1, counts), *sections]) + "\n"


def _sites(model_type: str, found: Any, verdicts: dict[str, str]) -> list[str]:
    """Return the sites of a model type: of its default model or, if that cannot be built, of the type's own file."""
    sites = found["types"].get(model_type, [])
    own = f"{model_type.replace('-', '_')}."
    return [site for site in verdicts if site.startswith(own)] if isinstance(sites, str) else sites


def _verdict(body: Body | None) -> str:
    if body is None:
        return "unknown"
    return f"left alone: {body.says}" if body.function is None else f"`{body.function.__name__}`"


def filled(path: Path, **texts: str) -> str:
    """Return a page with each text put between the marks of its name."""
    marked = re.compile(r"(<!-- (\w+): made by `make docs` -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{texts[match[2]]}\n{match[3]}", path.read_text())


def main() -> int:
    """Write the files that are stale or, with --check, name them and return 1."""
    wanted = {
        PAGE: page(),
        STUB: stub(),
        README: filled(README, figures=figures()),
        ROOT / "docs" / "benchmarks.md": benchmarks(),
        ROOT / "docs" / "predicted.md": predicted_page(),
        ROOT / "docs" / "families.md": model_types(),
        ROOT / "docs" / "methods.md": docs_methods.page(),
        CHOOSING: filled(CHOOSING, coverage=coverage_table(), digits=digits_tables()),
        TRAINING: filled(TRAINING, projector=projector_table()),
    }
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
