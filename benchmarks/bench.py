"""``python -m vlmfast bench``: time every op, and whole models, against their peers and the limits of the machine.

Ratios are taken within one run, from interleaved rounds. On a CPU the default is one thread: with more, a busy
neighbour decides. Pin the process (``taskset -c 1``) for steadier numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import vlmfast
from vlmfast.benchmarks import html, models, peers, published, report, timing
from vlmfast.benchmarks.ops import benchmark
from vlmfast.console import CommandError, console, one_line, usable_device, writable
from vlmfast.registry import OPS, Op

PUBLIC = [name for name in OPS if name in vlmfast.__all__]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        ops: names; none means every public op, or no op where models are asked for.
        peers: kinds of peers; None means those installed.
        models: names, of whole models; None means no model, an empty sequence every model.
        device, dtype, threads: where and how; without a dtype ops take bfloat16, and models what they take by
            themselves.
        html, json: files to write. source: a JSON to show in place of a new run.
    """

    ops: Sequence[str] = ()
    peers: Sequence[str] | None = None
    models: Sequence[str] | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int = 1
    html: Path | None = None
    json: Path | None = None
    source: Path | None = None

    @property
    def kept(self) -> Path | None:
        """Where the records go, while they are made and at the end."""
        return self.json or (self.html and self.html.with_suffix(".json"))


def run(options: Options) -> int:
    """Run the benchmarks that the options name; 1 if one of our own has an error, or nothing to be compared with."""
    _known("op", [name for name in options.ops if name not in OPS], tuple(PUBLIC))
    _known("peer", options.peers or (), (*peers.KINDS, "none"))
    _known("model", options.models or (), tuple(published.MODELS))
    asked = (options.models, options.peers, options.dtype, options.device)
    if options.source is not None and (options.ops or any(choice is not None for choice in asked)):
        raise CommandError("--from shows an earlier run whole: it takes no op, --models, --peers, --dtype or --device")
    for path in (options.html, options.json):
        writable(path)
    if options.html is not None:
        if options.html.suffix in (".json", ".csv"):
            raise CommandError(f"--html {options.html}: a file of that name would be written over by the records")
        html.require()
    out = console(150)
    if options.source is None:
        found = _measure(options, out)
    else:
        found = _read(options.source)
        _show(out, found)
    if options.kept is not None:
        report.write(options.kept, found)
        report.write_csv(options.kept.with_suffix(".csv"), found)
    if options.html is not None:
        options.html.write_text(html.page(found))
        out.print(f"report: {options.html}")
    wrong = [row for r in found["records"] for row in r["contenders"] if row["group"] == "ours" and row["error"]]
    return models.verdict(out, found["models"]) or int(bool(wrong))


def _known(kind: str, names: Sequence[str], known: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise CommandError(f"unknown {kind} {', '.join(unknown)}; known: {', '.join(known)}")


def _read(path: Path) -> dict[str, Any]:
    """What an earlier run wrote, of ops or of whole models alone as well."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if "models" not in found:
            found |= {"records": [], "models": found["records"]}
        for record in found["records"]:
            record["contenders"]
        for record in found["models"]:
            record["model"], record["variant"], record.get("error") or record["prefill_ms"]
        found["environment"]["device"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = one_line(error) if isinstance(error, OSError) else "it is not what `bench --json` writes"
        raise CommandError(f"cannot read {path}: {what}") from error
    return found


def _show(console: Console, found: dict[str, Any]) -> None:
    console.print(found["environment"])
    for name in dict.fromkeys(record["op"] for record in found["records"]):
        _show_op(console, [record for record in found["records"] if record["op"] == name], found["environment"])
    if found["models"]:
        models.show(console, found["models"])


def _show_op(console: Console, records: list[dict[str, Any]], where: dict[str, Any]) -> None:
    kind = "device time, cold cache" if where["kind"] != "cpu" else f"{where['threads']} thread(s)"
    console.print(report.table(records, kind))
    for line in report.errors(records):
        console.print(line, style="red", markup=False)


def _kinds(asked: Sequence[str] | None) -> tuple[str, ...]:
    if asked is None:
        return peers.installed()
    return tuple(kind for kind in asked if kind != "none")


def _measure(options: Options, console: Console) -> dict[str, Any]:
    if options.threads < 1:
        raise CommandError(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    place, dtype = usable_device(options.device), getattr(torch, options.dtype or "bfloat16")
    if place.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got {options.device}")
    if place.index is not None and place.type == "cuda":
        torch.cuda.set_device(place)
    device = place.type
    if options.models is not None:
        models.chosen_dtype(dtype if options.dtype else None, device)
    names = list(options.ops) or ([] if options.models is not None else PUBLIC)
    machine = timing.ceilings(device, dtype)
    found: dict[str, Any] = {"environment": report.environment(device, machine), "records": [], "models": []}
    console.print(
        f"{found['environment']['device']}, {options.dtype or 'bfloat16'}: a large copy {machine.copy_gb_per_s:.1f} "
        f"GB/s, a large matrix product {machine.gemm_tflop_per_s:.2g} TFLOP/s; "
        f"F.rms_norm is {found['environment']['F.rms_norm']}"
    )
    with _progress(console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            _one_op(OPS[name], device, dtype, options, machine, found, progress.console)
            progress.advance(task)
    if names:
        console.print(report.LEGEND, style="dim")
    if options.models is not None:
        found["models"] = models.run(
            options.models,
            device=device,
            dtype=dtype if options.dtype else None,
            console=console,
            save=lambda records: _keep(options, found, models=records),
        )
        models.show(console, found["models"])
    return found


def _keep(options: Options, found: dict[str, Any], **more: Any) -> None:
    """Write what is known so far: a stop loses only what was being measured."""
    found |= more
    if options.kept is not None:
        report.write(options.kept, found)


def _one_op(
    op: Op,
    device: str,
    dtype: torch.dtype,
    options: Options,
    machine: timing.Ceilings,
    found: dict[str, Any],
    console: Console,
) -> None:
    records = []
    for record in benchmark(op, device, dtype, _kinds(options.peers), machine):
        records.append(record)
        _keep(options, found, records=[*found["records"], record])
    _show_op(console, records, found["environment"])


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
