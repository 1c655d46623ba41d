"""Every op on every backend, beside its peers and the limit of the machine."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlmfast import registry
from vlmfast.benchmarks.timing import Times, measure
from vlmfast.registry import Op

LIMIT = "copy"


def contenders(op: Op, args: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """Name -> a call to time: our backends, the code they replace, their peers, and a copy of as many bytes."""
    found: dict[str, Callable[[], Any]] = {}
    chosen = [name for name, reason in op.refusals(*args) if reason is None and name in ("native", "triton")]
    for index, name in enumerate(chosen):
        call = functools.partial(op.function, *args)
        if index > 0:  # not the one that a user gets
            context = contextvars.copy_context()
            context.run(registry.pinned.set, name)  # cheaper per call than a `with` around each
            call = functools.partial(context.run, call)
        found[f"vlmfast {name}"] = call
    for name, prepare in {"transformers": op.upstream, **op.peers}.items():
        if prepare is not None:
            found[name] = prepare(*args)
    found["torch.compile"] = functools.partial(torch.compile(op.reference, dynamic=False), *args)
    found[LIMIT] = torch.empty(max(1, op.bytes(*args) // 2), dtype=torch.int8, device=args[0].device).clone
    return found


def wrong(op: Op, call: Callable[[], Any], args: tuple[Any, ...]) -> str | None:
    """Why a backend's result is not the definition's, or None: no speed is shown for a wrong result."""
    got, want = call(), op.reference(*args)
    for g, w in zip(_tuple(got), _tuple(want), strict=True):
        error = (g.double() - w.double()).abs().max()
        allowed = 4 * torch.finfo(w.dtype).eps if w.is_floating_point() and not op.exact else 0.0
        if not error <= allowed * w.double().abs().max():
            return f"differs from the definition by {float(error):.3g}"
    return None


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def benchmark(op: Op, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One record per workload: the times of every contender, or why one has none."""
    for label, args in op.workloads(device, dtype):
        torch._dynamo.reset()
        calls = contenders(op, args)
        failures = {}
        with torch.no_grad():
            for name in [n for n in calls if n.startswith("vlmfast")]:
                reason = wrong(op, calls[name], args)
                if reason is not None:
                    failures[name] = reason
                    del calls[name]
            times = measure(calls, device)
        yield record(op, label, args, times, failures)


def record(
    op: Op, label: str, args: tuple[Any, ...], times: dict[str, Times], failures: dict[str, str]
) -> dict[str, Any]:
    """What is written down of one workload; times in microseconds."""
    rows = {}
    for name, taken in times.items():
        rows[name] = {
            "us": taken.median * 1e6,
            "wall_us": sorted(taken.wall)[len(taken.wall) // 2] * 1e6,
            "gb_per_s": op.bytes(*args) / taken.median / 1e9,
            "over_copy": taken.over(times[LIMIT]),
        }
        if "transformers" in times:
            rows[name]["speedup"] = times["transformers"].over(taken)
        rows[name]["speedup_over_compile"] = times["torch.compile"].over(taken)
    return {
        "op": op.name,
        "workload": label,
        "dtype": str(args[0].dtype).removeprefix("torch."),
        "times": rows,
        "failed": failures,
    }
