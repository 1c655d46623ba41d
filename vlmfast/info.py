"""``python -m vlmfast info`` and ``explain``: what works on this machine, and why the rest does not."""

from __future__ import annotations

import importlib
import inspect
import platform
import textwrap
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor

import vlmfast
from vlmfast import backends
from vlmfast.console import CommandError, console, cpu_capabilities, facts, one_line, table, usable_device, version
from vlmfast.patches.bodies import BODIES
from vlmfast.registry import OPS, Op

T = TypeVar("T")
INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "bf16", "sve")


def info(options: Namespace) -> None:
    """Print versions, devices and what each backend can do; with ``options.all`` each op and what can be patched.

    A part that is broken is reported in its line.
    """
    out = console()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for section in (_machine, _backends, *((_ops,) if options.all else ())):
        out.print(_attempt(section, devices))
    out.print(_attempt(_bodies) if options.all else "with --all: which backend runs each op, and what can be patched")


def explain(options: Namespace) -> None:
    """Print `vlmfast.explain` for each workload of an op."""
    name = options.op
    if name not in OPS:
        raise CommandError(f"there is no op {name!r}; the ops are {', '.join(OPS)}")
    device, op = usable_device(options.device), OPS[name]
    function = getattr(importlib.import_module(op.reference.__module__), name)
    names = inspect.signature(function).parameters
    for _, args in op.cases.workloads(str(device), getattr(torch, options.dtype)):
        print(f"{name}({', '.join(map(_argument, names, args))})")
        print(textwrap.indent(vlmfast.explain(function, *args), "    "))


def _argument(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{name}={value!r}"
    return f"{name}: {'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"


def _attempt(function: Callable[..., T], *args: Any) -> T | str:
    try:
        return function(*args)
    except Exception as error:  # reported, not raised: the command shows what is broken
        return f"broken: {one_line(error)}"


# ---- versions and devices ----


def _machine(devices: list[str]) -> Table:
    rows = facts()
    rows.add_row("vlmfast", vlmfast.__version__)
    rows.add_row("Python", f"{platform.python_version()}, {platform.platform()}")
    rows.add_row("torch", f"{torch.__version__}, {_toolkit()}")
    for package in ("triton", "transformers"):
        rows.add_row(package, version(package) or "not installed")
    for device in devices:
        rows.add_row(device, _attempt(_cpu) if device == "cpu" else _attempt(_gpu, device))
    return rows


def _toolkit() -> str:
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip is not None else "built for CPUs only"


def _cpu() -> str:
    capabilities = cpu_capabilities()
    sets = [name for name in INSTRUCTION_SETS if capabilities.get(name)]
    known = f"{capabilities['cpu_name']}, {', '.join(sets)}; " if capabilities else ""
    level = backends.cpu_level()
    native = f"native: {level}, " if level else ""
    return f"{known}torch: {torch.backends.cpu.get_cpu_capability()}, {native}threads: {torch.get_num_threads()}"


def _gpu(device: str) -> str:
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"


# ---- backends ----


def _backends(devices: list[str]) -> Table:
    rows = table("backend", *devices)
    for name in backends.LOADERS:
        rows.add_row(name, *(_backend(name, device) for device in devices))
    return rows


def _ops(devices: list[str]) -> Table:
    rows = table("op", *(f"runs on {device} by" for device in devices))
    for op in OPS.values():
        rows.add_row(op.name, *(_attempt(_first_backend, op, device) for device in devices))
    return rows


def _refusal(op: Op, backend: str, device: str) -> str | None:
    """Say why the backend cannot run a small bfloat16 call of the op, or None."""
    with vlmfast.use(backend):
        [(_, reason)] = op.refusals(*next(iter(op.cases.samples(device, torch.bfloat16))))
    return reason


def _backend(name: str, device: str) -> str:
    """Count the ops that the backend runs, and the reasons why it does not run the others."""
    reasons = Counter(_attempt(_refusal, op, name, device) for op in OPS.values())
    counted = {reason: "1 op" if number == 1 else f"{number} ops" for reason, number in reasons.items()}
    lines = [f"{reason} ({ops})" for reason, ops in counted.items() if reason is not None]
    return "\n".join([f"{reasons[None]} of {len(OPS)} ops", *lines])


def _first_backend(op: Op, device: str) -> str:
    args = next(iter(op.cases.samples(device, torch.bfloat16)))
    return next((name for name, reason in op.refusals(*args) if reason is None), "none")


# ---- models ----


def _bodies() -> Table:
    """Return which methods each function replaces."""
    rows = table("replacement", "what it replaces")
    said = defaultdict(list)
    for body in BODIES:
        if body.function is not None:
            said[body.function.__name__].append(f"{body.method} {body.says}")
    for name, texts in said.items():
        rows.add_row(name, "\n".join(texts))
    return rows
