"""Write the report of a benchmark run as one self-contained HTML file: the tables of the console, and plots as SVG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from html import escape
from typing import Any

from rich.console import Console

from vlmfast.benchmarks import predicted, report

COLOURS = {"ours": "#c1121f", "peer": "#457b9d", "limit": "#8d99ae"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vlmfast on {device}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; color: #1d2530 }}
pre {{ font-size: 12px; overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>vlmfast on {device}</h1>
<p>{where}</p>
{sections}
</body></html>
"""


def page(run: dict[str, Any]) -> str:
    """Make the whole file from a run as `report.write` writes it."""
    where, records, sections = run["environment"], run["records"], []
    if records:
        sections.append(_printed(lambda console: console.print(report.LEGEND)))
    if any(record["flops"] for record in records):
        sections += ["<h2>Roofline</h2>", _roofline(run)]
    for of_op in report.by_op(records):
        figures = [_scaling(of_op)] if any(map(_timed, of_op)) else []
        sections += [f"<h2>{of_op[0]['op']}</h2>", *figures, _printed(report.show_op, of_op, where)]
    if run["models"]:
        sections += ["<h2>Whole models</h2>", _printed(report.show_models, run["models"])]
    if (bounds := predicted.rows([run], {record["op"] for record in records}))[1]:
        sections += ["<h2>Predicted for GPUs, not measured</h2>", f"<p>{escape(predicted.EXPLAINED)}</p>"]
        sections.append(
            _printed(lambda console: report.show_table(console, bounds[0], 2, [(None, r) for r in bounds[1]]))
        )
    facts = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    return PAGE.format(device=escape(where["device"]), where=escape(facts), sections="\n".join(sections))


def _printed(show: Callable[..., None], *args: Any) -> str:
    """Return as HTML what a function prints on the console that it is given."""
    console = Console(record=True, file=io.StringIO(), width=200, highlight=False)
    show(console, *args)
    return console.export_html(code_format="<pre>{code}</pre>", inline_styles=True)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlmfast"}):  # makes the file reproducible
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _timed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """List the contenders with a time; none of a record of a graph, whose bytes are not counted."""
    return [row for row in record["contenders"] if "us" in row and record["bytes"]]


def _scaling(records: list[dict[str, Any]]) -> str:
    """Draw the time of every contender over the bytes that each shape takes."""
    figure, axes = _figure(7, 3.6)
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record["bytes"]):
        for row in _timed(record):
            lines.setdefault((row["name"], row["group"]), []).append((record["bytes"] / 1e6, row["us"]))
    for style, ((name, group), points) in zip(itertools.cycle(["-", "--", ":", "-."]), lines.items()):
        axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=COLOURS[group], label=name)
    axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="us")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _roofline(run: dict[str, Any]) -> str:
    """Draw speed over arithmetic intensity, below the bandwidth of a copy and the speed of a matmul."""
    where = run["environment"]
    figure, axes = _figure(9, 4.6)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in run["records"]:
        for row in _timed(record):
            if record["flops"] and row["group"] != "limit":
                point = record["flops"] / record["bytes"], row["tflop_per_s"]
                points.setdefault((row["group"], record["op"]), []).append(point)
    for (group, op), found in points.items():
        axes.plot(*zip(*found, strict=True), "o" if group == "ours" else "x", color=COLOURS[group], ms=5, alpha=0.8)
        if group == "ours":
            axes.annotate(op, max(found, key=lambda point: point[1]), fontsize=7, rotation=15)
    axes.plot([], [], "o", color=COLOURS["ours"], label="vlmfast")
    axes.plot([], [], "x", color=COLOURS["peer"], label="peers")
    peak, bandwidth = where["gemm_tflop_per_s"], where["copy_gb_per_s"]
    knee = peak * 1e3 / bandwidth
    intensities = [record["flops"] / record["bytes"] for record in run["records"] if record["flops"]]
    left, right = min(intensities) / 2, 2 * max(*intensities, knee)
    axes.plot([left, knee, right], [left * bandwidth / 1e3, peak, peak], color="#333", lw=1, label="ceiling measured")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)
