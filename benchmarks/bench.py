"""One run of the benchmark: ops and whole models, timed against their peers and the limits of the machine.

Ratios are taken within one run, from interleaved rounds. On a CPU the default is one thread, because with more threads
other load on the machine dominates the result. Pin the process (``taskset -c 1``) for steadier numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from argparse import Namespace
from collections import ChainMap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import vlmfast
from vlmfast.benchmarks import graphs, html, models, peers, report, timing
from vlmfast.benchmarks.candidates import CANDIDATES
from vlmfast.benchmarks.modes import MODES
from vlmfast.benchmarks.ops import benchmark
from vlmfast.cases import Workloads
from vlmfast.console import CommandError, console, needed, usable_device, writable
from vlmfast.reduce.spelling import spell
from vlmfast.registry import OPS, Op

PUBLIC = [name for name in OPS if name in vlmfast.__all__]
KNOWN = ChainMap(OPS, CANDIDATES)
Run = dict[str, Any]


def run(options: Namespace) -> int:
    """Run the benchmarks that the command line names, or show an earlier run.

    Without names of ops, every public op is run, or none where models are asked for. ``models=None`` means no model, an
    empty ``models`` means all of them. Returns the exit code: 1 if one of our own contenders has an error, or no model
    could be built.
    """
    asked = (options.models, options.peers, options.dtype, options.device)
    if options.source is not None and (options.ops or any(choice is not None for choice in asked)):
        raise CommandError("--from shows an earlier run whole: it takes no op, --models, --peers, --dtype or --device")
    kept = _checked_files(options)
    out = console(150)
    if options.source is None:
        found = _measure(options, kept, out)
    else:
        found = report.read(options.source)
        _show(out, found)
    if kept is not None:
        report.write(kept, found)
        if found["records"]:
            report.write_csv(kept.with_suffix(".csv"), found)
    if options.html is not None:
        options.html.write_text(html.page(found))
        out.print(f"report: {options.html}")
    wrong = [row for r in found["records"] for row in r["contenders"] if row["group"] == "ours" and row["error"]]
    return models.verdict(out, found["models"]) or int(bool(wrong))


def _checked_files(options: Namespace) -> Path | None:
    """Return the file of the records, or None; refuse files that cannot be written or that overwrite one another."""
    kept: Path | None = options.json or (options.html and options.html.with_suffix(".json"))
    if options.json is not None and options.json.suffix == ".csv":
        raise CommandError(f"--json {options.json}: a file of that name would be written over by the CSV")
    if options.html is not None:
        if options.html.suffix in (".json", ".csv") or options.html == options.json:
            raise CommandError(f"--html {options.html}: a file of that name would be written over by the records")
        needed("matplotlib", "--html")
    writable("--html", options.html, make_folder=True)
    if kept is not None:
        argument = "--html" if options.json is None else "--json"
        for path in (kept, kept.with_suffix(".csv")):
            writable(argument, path, make_folder=True)
    return kept


def _show(console: Console, found: Run) -> None:
    console.print(found["environment"])
    for records in report.by_op(found["records"]):
        report.show_op(console, records, found["environment"])
    if found["models"]:
        report.show_models(console, found["models"])


def _asked(names: Iterable[str], device: str, dtype: torch.dtype) -> list[Op]:
    """Return the ops of these names, each once; an op named with workloads (rms_norm:600x2048) has only these."""
    wanted: dict[str, list[str]] = {}
    for text in names:
        name, _, workload = text.partition(":")
        wanted.setdefault(name, []).append(workload)
    return [_with_workloads(KNOWN[name], labels, device, dtype) for name, labels in wanted.items()]


def _with_workloads(op: Op, wanted: list[str], device: str, dtype: torch.dtype) -> Op:
    if "" in wanted:
        return op
    known = [label for label, _ in op.cases.workloads(device, dtype)]
    if unknown := [label for label in wanted if label not in known]:
        raise CommandError(f"{op.name} has no workload {', '.join(unknown)} here; it has: {', '.join(known)}")

    return _filtered(op, lambda label: label in wanted)


def _without(op: Op, done: set[str]) -> Op:
    """Return the op without the workloads of these labels."""
    return _filtered(op, lambda label: label not in done)


def _filtered(op: Op, keeps: Callable[[str], bool]) -> Op:
    def workloads(device: str, dtype: torch.dtype) -> Workloads:
        return ((label, args) for label, args in op.cases.workloads(device, dtype) if keeps(label))

    return dataclasses.replace(op, _cases=dataclasses.replace(op.cases, workloads=workloads))


def _earlier(options: Namespace, kept: Path | None, where: dict[str, Any]) -> Run:
    """Return what --resume goes on with: the results without an error in the file, from this device and versions."""
    nothing: Run = {"records": [], "models": []}
    if not options.resume or kept is None or not kept.exists():
        return nothing
    found = report.read(kept)
    if report.changed(found["environment"], where, (*report.SAME, "threads", "dtype")):
        return nothing
    ours = [[row["error"] for row in record["contenders"] if row["group"] == "ours"] for record in found["records"]]
    right = [record for record, errors in zip(found["records"], ours, strict=True) if not any(errors)]
    broken = {(record["model"], record.get("mode")) for record in found["models"] if "error" in record}
    whole = [record for record in found["models"] if (record["model"], record.get("mode")) not in broken]
    return {"records": right, "models": whole}


def _measure(options: Namespace, kept: Path | None, console: Console) -> Run:
    torch.set_num_threads(options.threads)
    place, dtype = usable_device(options.device), options.dtype and getattr(torch, options.dtype)
    device = place.type
    if device not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda, got {options.device}")
    if place.index is not None and device == "cuda":
        torch.cuda.set_device(place)
    if options.models is not None and device == "cpu":
        if dtype == torch.float16:
            raise CommandError("no model runs in float16 on a CPU: take --dtype float32 or bfloat16")
        if "graph" in options.modes:
            raise CommandError("mode graph: CUDA graphs need a GPU")
    where = report.environment(device) | ({} if options.dtype is None else {"dtype": options.dtype})
    found: Run = {"environment": where, **_earlier(options, kept, where)}

    def keep(kind: str, records: list[dict[str, Any]]) -> None:
        found[kind] = records  # written after every record, so that a stop loses only the measurement in progress
        if kept is not None:
            report.write(kept, found)

    if ops := _asked(options.ops or ([] if options.models is not None else PUBLIC), device, dtype or torch.bfloat16):
        kinds = peers.installed() if options.peers is None else tuple(kind for kind in options.peers if kind != "none")
        dtype_of_ops = dtype or torch.bfloat16
        machine = timing.ceilings(device, dtype_of_ops)
        where |= vars(machine)
        console.print(
            f"{where['device']}, {str(dtype_of_ops).removeprefix('torch.')}: a large copy {machine.copy_gb_per_s:.1f} "
            f"GB/s, a large matmul {machine.gemm_tflop_per_s:.2g} TFLOP/s; F.rms_norm is {where['F.rms_norm']}"
        )
        for op in track(ops, "measuring", console=console, transient=True, disable=not console.is_terminal):
            records = [record for record in found["records"] if record["op"] == op.name]
            done = {record["workload"] for record in records}
            found_of_op = benchmark(_without(op, done), device, dtype_of_ops, kinds, machine)
            left = _without(op, {label.removesuffix(graphs.IN_GRAPH) for label in done if graphs.IN_GRAPH in label})
            in_graphs = graphs.benchmark(left, device, dtype_of_ops, machine) if "compile" in kinds else ()
            for record in itertools.chain(found_of_op, in_graphs):
                records.append(record)
                keep("records", [*found["records"], record])
            report.show_op(console, records, where)
        console.print(report.LEGEND, style="dim")
    if options.models is not None:
        records = models.run(
            options.models,
            console,
            modes=options.modes or [mode for mode in MODES if device != "cpu" or mode != "graph"],
            device=device,
            dtype=dtype or (torch.float32 if device == "cpu" else torch.bfloat16),
            size=options.size or ("small" if device == "cpu" else "full"),
            save=functools.partial(keep, "models"),
            budget=options.budget,
            earlier=found["models"],
            reduce=options.reduce and spell(options.reduce),
            layers=options.layers,
        )
        keep("models", records)
        report.show_models(console, records)
    return found
