"""The report of a benchmark run as one HTML file that needs no network: tables, and plots as SVG within it."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

from vlmfast.benchmarks import report
from vlmfast.console import CommandError

COLOURS = {"ours": "#c1121f", "peer": "#457b9d", "limit": "#8d99ae"}

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vlmfast on {{ where.device }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1d2530 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e3e7ec; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
tr.ours { font-weight: 600 } tr.limit { color: #6b7684 }
td.error { color: #b00020; text-align: left; white-space: normal }
figure { margin: 0 } svg { max-width: 100%; height: auto } .figures { display: flex; flex-wrap: wrap }
</style></head><body>
<h1>vlmfast on {{ where.device }}</h1>
<p>{% for name, value in where.items() if value is not none %}{{ name }} {{ value }}{{ ", " if not loop.last }}
{%- endfor %}</p>
{% if ops %}<p style="white-space: pre-line">{{ legend }}</p>{% endif %}
{% if roofline %}<h2>Roofline</h2><figure>{{ roofline }}</figure>{% endif %}
{% for op in ops %}<h2>{{ op.name }}, {{ op.dtype }}</h2>{% set width = op.columns|length %}
<div class="figures">{% for figure in op.figures %}<figure>{{ figure }}</figure>{% endfor %}</div>
<table><tr><th>shape</th><th></th>{% for key in op.columns %}<th>{{ columns[key][0] }}</th>{% endfor %}</tr>
{% for record in op.records %}{% for row in record.contenders %}<tr class="{{ row.group }}">
<td>{{ record.workload if loop.first }}</td><td>{{ row.name }}</td>
{% if row.error %}<td class="error" colspan="{{ width }}">{{ row.error }}</td>{% else %}{% for key in op.columns %}
<td>{{ cell(columns, key, row) }}</td>{% endfor %}{% endif %}
</tr>{% endfor %}{% endfor %}</table>
{% endfor %}
{% if models %}<h2>Whole models</h2>
<table><tr><th>model</th><th></th>{% for key in model_columns %}<th>{{ model_columns[key][0] }}</th>{% endfor %}</tr>
{% for row in models %}<tr>
<td>{{ row.model }}, {{ row.size }}{{ ", " ~ row.mode if row.mode }}</td><td>{{ row.variant }}</td>
{% if row.error %}<td class="error" colspan="{{ model_columns|length }}">{{ row.error }}</td>{% else %}
{% for key in model_columns %}<td>{{ cell(model_columns, key, row) }}</td>{% endfor %}{% endif %}
</tr>{% endfor %}</table>
{% endif %}
</body></html>
"""


def require() -> None:
    """Refuse to begin a run whose report could not be made."""
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"--html needs {package}: pip install matplotlib")


def page(run: dict[str, Any]) -> str:
    """Make the whole file from what `report.write` wrote."""
    from jinja2 import Environment
    from markupsafe import Markup

    ops = []
    for records in report.by_op(run["records"]):
        ops.append(
            {
                "name": records[0]["op"],
                "dtype": records[0]["dtype"],
                "records": records,
                "columns": report.columns(records),
                "figures": [Markup(figure) for figure in (_bars(records), _scaling(records)) if figure],
            }
        )
    roofline = Markup(_roofline(run)) if any(record["flops"] for record in run["records"]) else None
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        where=run["environment"],
        ops=ops,
        columns=report.COLUMNS,
        roofline=roofline,
        legend=report.LEGEND,
        models=run["models"],
        model_columns=report.MODEL_COLUMNS,
        cell=report.cell,
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlmfast"}):  # the same run gives the same file
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _timed(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["contenders"] if "us" in row]


def _bars(records: list[dict[str, Any]]) -> str | None:
    """Draw the time of every contender on every shape."""
    rows = [(record["workload"], row) for record in records for row in _timed(record)]
    if not rows:
        return None
    figure, axes = _figure(6.4, 0.8 + 0.17 * (len(rows) + len(records)))
    y, ticks = 0.0, []
    for record in records:
        for row in _timed(record):
            axes.barh(y, row["us"], color=COLOURS[row["group"]], height=0.8)
            ticks.append((y, f"{record['workload']}  {row['name']}"))
            y += 1
        y += 0.7
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("us")
    return _svg(figure)


def _scaling(records: list[dict[str, Any]]) -> str | None:
    """Draw how the time grows with the rows or tokens, by the bytes that they take."""
    if len(records) < 2:
        return None
    figure, axes = _figure(5.2, 3.6)
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record["bytes"]):
        for row in _timed(record):
            lines.setdefault((row["name"], row["group"]), []).append((record["bytes"] / 1e6, row["us"]))
    styles = ["-", "--", ":", "-."]
    for index, ((name, group), points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), styles[index % 4], marker="o", ms=3, color=COLOURS[group], label=name)
    axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="us")
    axes.legend(fontsize=7, frameon=False)
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
