"""Benchmark every op on every backend, beside its peers and the limits of the machine."""

from __future__ import annotations

import contextvars
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmfast import registry
from vlmfast.benchmarks import peers
from vlmfast.benchmarks.timing import Call, CallError, Ceilings, Times, bytes_to_copy, measure
from vlmfast.console import one_line
from vlmfast.registry import Op

STATIC_REPORT = Path(__file__).parent / "results" / "static.json"
OURS = "vlmfast"
COPY = "copy"
# Largest error, in roundings of the largest output. Peers may round at other places than Hugging Face.
ROUNDINGS_ALLOWED = {"ours": 16.0, "peer": 64.0}


@dataclass
class Contender:
    """One way to do an op's work, and its measurements.

    Attributes:
        name: as the table shows it.
        group: "ours", "peer" (computes the same) or "limit" (does less work than the op).
        prepare: builds the call to time from the op's arguments.
        backend: the name of our backend; None for others.
        call: the call that ``prepare`` built.
        times: the times of the call.
        error: why it has no time, in one line.
        roundings: the distance of its result from the definition's, in roundings of the largest output; 0 is bit-equal.
    """

    name: str
    group: str
    prepare: Callable[..., Call]
    backend: str | None = None
    call: Call | None = None
    times: Times | None = None
    error: str | None = None
    roundings: float | None = None


def contenders(op: Op, args: tuple[Any, ...], kinds: tuple[str, ...]) -> list[Contender]:
    """List our backends that take the call, the peers of these kinds, the op's limits, and a copy of as many bytes."""
    refusals = {name: reason for name, reason in op.refusals(*args) if name in ("native", "triton")}
    chosen = [name for name, reason in refusals.items() if reason is None]
    found = [
        Contender(f"{OURS} {name}", "ours", functools.partial(_ours, op, name if index else None), name)
        for index, name in enumerate(chosen)
    ]
    if refusals and not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        found = [Contender(OURS, "ours", functools.partial(_refused, reasons))]
    found += [Contender(name, "peer", prepare) for name, prepare in peers.of(op, kinds)]
    found += [Contender(name, "limit", prepare) for name, prepare in op.cases.limits.items()]
    half = max(1, op.cases.bytes(*args) // 2)
    return [*found, Contender(COPY, "limit", lambda x, *_: bytes_to_copy(half, x.device).clone)]


def _refused(reasons: str, *_: Any) -> Call:
    raise RuntimeError(f"no kernel runs this call ({reasons})")


def _ours(op: Op, pin: str | None, *args: Any) -> Call:
    call = functools.partial(op.function, *args)
    if pin is None:  # the backend that a user gets
        return call
    context = contextvars.copy_context()
    context.run(registry.order.set, (pin,))  # cheaper per call than `with vlmfast.use(pin)`
    return functools.partial(context.run, call)


def distance(got: Any, want: Any, coarsest: float = 0.0) -> float:
    """Return the distance of two results, in roundings of the largest element; infinite where shapes or NaNs differ.

    A rounding is the eps of the result's dtype, or ``coarsest`` where that is larger: the eps of a coarser input dtype.
    """
    farthest = 0.0
    for g, w in zip(_tuple(got), _tuple(want), strict=True):
        if g.shape != w.shape:
            return math.inf
        if w.numel() == 0 or torch.equal(g, w):
            continue
        unit = max(torch.finfo(w.dtype).eps, coarsest) * w.double().abs().max() if w.is_floating_point() else 0.0
        apart = float((g.double() - w.double()).abs().max() / unit)
        farthest = max(farthest, math.inf if math.isnan(apart) else apart)
    return farthest


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def prepare(contender: Contender, op: Op, args: tuple[Any, ...], want: Any) -> None:
    """Build a contender's call and compare its result; one that fails or is wrong gets an error instead of a time."""
    try:
        contender.call = contender.prepare(*args)
        got = contender.call()
        if contender.group == "limit":
            return
        # A result may be more precise than the inputs: from bfloat16 keys, peers compute float32 scores by way of
        # bfloat16 logits.
        inputs = [torch.finfo(a.dtype).eps for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        contender.roundings = distance(got, want, max(inputs, default=0.0) if contender.group == "peer" else 0.0)
    except Exception as error:  # another project's error, of any type, becomes a row of the table
        contender.error = one_line(error)
        return
    allowed = 0.0 if op.exact and contender.group == "ours" else ROUNDINGS_ALLOWED[contender.group]
    if not contender.roundings <= allowed:
        contender.error = f"no speed: differs from the definition by {contender.roundings:.3g} roundings"


def benchmark(
    op: Op, device: str, dtype: torch.dtype, kinds: tuple[str, ...], machine: Ceilings
) -> Iterator[dict[str, Any]]:
    """Yield one record per workload: the times of every contender, or its error."""
    for label, args in op.cases.workloads(device, dtype):
        found = contenders(op, args, kinds)
        with torch.no_grad():
            try:
                want = op.reference(*args)
            except Exception as error:  # for example, too little memory
                _fail(found, f"no definition to compare with: {one_line(error)}")
            else:
                for contender in found:
                    prepare(contender, op, args, want)
                time(found, device)
        yield record(op, label, args, found, machine)


def _fail(found: Iterable[Contender], error: str) -> None:
    for contender in found:
        contender.error = error


def time(found: list[Contender], device: str) -> None:
    """Time all contenders without an error; if one fails now, record its error and time the others again."""
    while by_name := {c.name: c for c in found if c.error is None}:
        try:
            taken = measure({name: c.call for name, c in by_name.items() if c.call is not None}, device)
        except CallError as failed:
            by_name[failed.args[0]].error = one_line(failed.__cause__ or failed)
        except Exception as error:  # an asynchronous error of the device, which does not name the kernel
            _fail(by_name.values(), one_line(error))
        else:
            for name, times in taken.items():
                by_name[name].times = times
            return


@functools.cache
def _traffic() -> dict[tuple[str, str], float]:
    records = json.loads(STATIC_REPORT.read_text())["traffic"] if STATIC_REPORT.exists() else []
    return {(record["op"], record["backend"]): record["ratio"] for record in records}


def counted(op: str, backend: str) -> float | None:
    """Return the ratio of the bytes that an op's kernels move to the fewest possible, as counted by `make static`.

    Each byte counts once per launch. Returns None for CPU kernels, which are not counted.
    """
    return _traffic().get((op, backend))


def record(
    op: Op, label: str, args: tuple[Any, ...], found: list[Contender], machine: Ceilings, alone: bool = True
) -> dict[str, Any]:
    """Make the record of one workload, times in microseconds; bytes and FLOP are known only of an op ``alone``."""
    bytes, flops = (op.cases.bytes(*args), op.cases.flops(*args) if op.cases.flops else 0) if alone else (0, 0)
    by_name = {c.name: c.times for c in found if c.times is not None}
    rows = []
    for contender in found:
        row: dict[str, Any] = {"name": contender.name, "group": contender.group, "error": contender.error}
        row["roundings"] = contender.roundings if contender.roundings != math.inf else None
        if (times := contender.times) is not None:
            row |= {"us": times.median * 1e6, "spread": times.spread, "wall_us": statistics.median(times.wall) * 1e6}
            if COPY in by_name:
                row["over_copy"] = times.over(by_name[COPY])
            for name, key in {"transformers": "x_transformers", "torch.compile": "x_compile"}.items():
                if name in by_name:
                    row[key] = by_name[name].over(times)
            if contender.group != "limit" and bytes:
                row["gb_per_s"] = bytes / times.median / 1e9
                row["tflop_per_s"] = flops / times.median / 1e12 if flops else None
                row["of_ceiling"] = machine.seconds(bytes, flops) / times.median
        if contender.backend is not None:
            compiled = "cuda" if args[0].is_cuda else "cpu"
            row["traffic"] = counted(op.name, compiled if contender.backend == "native" else contender.backend)
        rows.append(row)
    return {
        "op": op.name,
        "workload": label,
        "dtype": str(args[0].dtype).removeprefix("torch."),
        "bytes": bytes,
        "flops": flops,
        "contenders": rows,
    }
