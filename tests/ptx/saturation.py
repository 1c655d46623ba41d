"""Check whether kernels can saturate the memory of an H200, and bound what they reach of a copy on each GPU.

    TRITON_INTERPRET=1 python -m tests.ptx.saturation rms_norm_backward > saturation.json

The calls are real shapes in bfloat16. `saturation` has a record for each launch on an H200, of Triton's kernels and of
CUDA's as nvcc compiled them:

* `in_flight`: bytes in flight per multiprocessor (`tests/helpers/in_flight.py`). 48 KiB are enough. So is an `at_once`
  of nearly 1, the share of all bytes that the kernel loads which is in flight: more there is not.
* `instructions`: instructions of all threads, as the machine counts them, per byte of the op (`Cases.bytes`), without
  moves between registers, which disappear in machine code.

`predicted` has a record for each launch and each call: for every GPU of `vlmfast.benchmarks.predicted` the most that it
reaches of a copy, and why. Instructions are counted once, as compiled for sm_90; registers, shared memory, bytes in
flight and programs are those of each GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any
from unittest import mock

import torch

from tests.helpers import in_flight, interpreter, traffic
from tests.helpers.cases import PRIMITIVE
from tests.ptx import backend, counts, nvcc, saturation_nvcc
from tests.ptx.compile import OPTIONS, Compiled, compiled
from vlmfast import backends
from vlmfast.architectures import GPUS as TARGETS
from vlmfast.benchmarks import predicted
from vlmfast.benchmarks.predicted import GPUS, Launch
from vlmfast.registry import Op

PLACE = "ptx_sm_90"
H200 = GPUS["H200"]
MOST_INSTRUCTIONS = 4.0  # per byte; an H200 can issue 7, less stalls
MOST_BYTES = 48 << 20  # of a call: larger ones take minutes here and give the same picture
MOST_BYTES_OF_CHOICES = 8 << 20  # of a greedy selection, which multiplies, and reads its similarities for each choice
Counted = list[tuple[str, int, int, int]]  # of each launch: kernel, bytes that it loads and stores, instructions


def measured_ops() -> list[Op]:
    """Return the ops that memory bounds, and the greedy selections, in which each choice waits for the one before."""
    greedy = [op for op in PRIMITIVE if op.family == "greedy_selection"]
    return [op for op in traffic.BOUND_BY_MEMORY if op in PRIMITIVE] + greedy


def limits() -> dict[str, str]:
    """Map kernels that fall short to the reason, from the ``limited`` attribute beside their config."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("vlmfast.kernels.")]
    functions = [getattr(value, "fn", None) for module in modules for value in vars(module).values()]
    return {f.__name__: f.limited for f in functions if isinstance(f, FunctionType) and hasattr(f, "limited")}


def launches_on(op: Op, args: tuple[Any, ...], gpu: predicted.Gpu, counted: Counted | None = None) -> list[Launch]:
    """Return the launches of a call on a GPU.

    The kernels run, and are counted, only where ``counted`` is None: what they compute decides no further launch.
    """
    found: list[Launch] = []

    def launcher(function: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        arguments = dict(inspect.signature(function.fn).bind(*given, **named).arguments)
        module = compiled(function, arguments, options, gpu.target, code=True)
        grid = (*(grid(arguments) if callable(grid) else grid), 1, 1)[:3]
        name = function.fn.__name__
        count = run(module, name, arguments, grid) if counted is None else counted[len(found)]
        warps = options.get("num_warps", 4)
        room = in_flight.resident(module.registers, warps, module.shared, gpu.shared)
        each = warps * 32 * in_flight.outstanding(module.code)
        if count[0] != name:
            raise RuntimeError(f"{op.name} launches {name} for {gpu.target}, and {count[0]} where it was counted")
        found.append(Launch(name, grid[0] * grid[1] * grid[2], room, each, *count[1:]))

    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    with on(op, gpu), mock.patch.object(interpreted, "run", launcher):
        op.backend("triton").run(*args)
    return found


@contextlib.contextmanager
def on(op: Op, gpu: predicted.Gpu) -> Iterator[None]:
    """Make an op's launchers see the multiprocessors and the shared memory of a GPU."""
    module = sys.modules[op.backend("triton").run.__module__]
    with contextlib.ExitStack() as stack:
        for name, value in (("processors", gpu.multiprocessors), ("shared_memory", TARGETS[gpu.target])):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, return_value=value))
        yield


def run(module: Compiled, name: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> tuple[str, int, int, int]:
    """Run a launch, and count the bytes that it loads and stores and its instructions."""
    machine = backend.machine_for(module.ptx, name)
    before = machine.ran.copy()
    backend.launch(module, name, arguments, grid)
    ran = machine.ran - before
    tensors = sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor))
    return (name, *counts.moved(machine, ran, tensors), counts.issued(machine, ran))


def shapes(op: Op) -> Iterator[tuple[str, tuple[Any, ...], int]]:
    """Yield the real shapes of an op: label, arguments and bytes; smaller calls are too short to saturate a memory."""
    torch.manual_seed(0)
    most = MOST_BYTES if op in traffic.BOUND_BY_MEMORY else MOST_BYTES_OF_CHOICES
    for label, args in op.cases.workloads("cpu", torch.bfloat16):
        if traffic.ENOUGH <= (moved := op.cases.bytes(*args)) <= most:
            yield label, args, moved


def on_all(op: Op, args: tuple[Any, ...]) -> dict[str, list[Launch]]:
    """Return the launches of a call on each of the `GPUS`."""
    mine = launches_on(op, args, H200)
    counted = [(one.kernel, one.read, one.stored, one.instructions) for one in mine]
    by_target = {H200.target: mine}
    for gpu in GPUS.values():
        if gpu.target not in by_target:
            by_target[gpu.target] = launches_on(op, args, gpu, counted)
    return {name: by_target[gpu.target] for name, gpu in GPUS.items()}


def saturation(op: Op, label: str, launch: Launch, moved: int, place: str = "triton") -> dict[str, Any]:
    """Make the record of a launch on an H200; the place is "triton" or "cuda"."""
    facts = {"in_flight": launch.in_flight(H200), "at_once": round(launch.at_once(H200), 2)}
    facts["instructions"] = round(launch.instructions / moved, 2)
    reasons = limits() if place == "triton" else saturation_nvcc.limits()
    reason = {"limited": reasons[launch.kernel]} if launch.kernel in reasons else {}
    told = {"op": op.name, "backend": place, "workload": label, "kernel": launch.kernel, "programs": launch.programs}
    return {**told, **facts, **reason}


def bounds(op: Op, label: str, args: tuple[Any, ...], of_gpus: dict[str, list[Launch]]) -> list[dict[str, Any]]:
    """Make the record of what a call reaches and, if it has several launches, one of each."""
    with mock.patch("vlmfast.cases.multiprocessors", return_value=H200.multiprocessors):  # as counted: partial sums
        moved = op.cases.bytes(*args)
    count = len(of_gpus["H200"])
    parts = [slice(None), *(slice(index, index + 1) for index in range(count) if count > 1)]
    found = [predicted.record(op.name, label, moved, {k: v[part] for k, v in of_gpus.items()}) for part in parts]
    return [record for index, record in enumerate(found) if record not in found[:index]]


def falls_short(record: dict[str, Any]) -> bool:
    """Tell whether a kernel has too few bytes in flight, and not nearly all of them, or too many instructions."""
    idle = record["in_flight"] < H200.needed and record["at_once"] < predicted.AT_ONCE
    return idle or record["instructions"] > MOST_INSTRUCTIONS


def main(names: list[str]) -> None:
    interpreter.repair()
    backends.LOADERS |= backend.LOADERS
    found: dict[str, list[dict[str, Any]]] = {"saturation": [], "predicted": []}
    for op in (op for op in measured_ops() if not names or op.name in names):
        for label, args, moved in shapes(op):
            of_gpus = on_all(op, args)
            found["saturation"] += [saturation(op, label, launch, moved) for launch in of_gpus["H200"]]
            found["predicted"] += bounds(op, label, args, of_gpus)
            if nvcc.find_nvcc() is not None and traffic.has_kernels(op, "emulated"):
                launches = saturation_nvcc.launches_on(op, args)
                found["saturation"] += [saturation(op, label, launch, moved, "cuda") for launch in launches]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
