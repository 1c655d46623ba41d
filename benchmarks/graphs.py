"""Time ops inside a compiled graph: layers around an op, with our op and with upstream's code.

An op that is compiled alone pays for a whole graph and has no neighbours to fuse with, so its time would say nothing
about a compiled model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import vlmfast
from vlmfast.benchmarks.ops import OURS, Contender, prepare, record, time
from vlmfast.benchmarks.timing import Call, Ceilings
from vlmfast.cases import Preparation
from vlmfast.registry import Op

IN_GRAPH = ", in a graph"  # behind the label of a workload


def benchmark(op: Op, device: str, dtype: torch.dtype, machine: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield one record per workload of an op whose cases have layers: the times of both graphs, or their errors."""
    if not op.cases.layers:
        return
    for label, args in op.cases.workloads(device, dtype):
        torch._dynamo.reset()
        found = [
            Contender(name, "ours" if name == OURS else "peer", _compiled(layers))
            for name, layers in op.cases.layers.items()
        ]
        with torch.no_grad():
            with vlmfast.use("torch"):
                want = op.cases.layers[OURS](*args)()
            for contender in found:
                prepare(contender, op, args, want)
            time(found, device)
        yield record(op, f"{label}{IN_GRAPH}", args, found, machine, alone=False)


def _compiled(layers: Preparation) -> Callable[..., Call]:
    return lambda *args: torch.compile(layers(*args), dynamic=False)
