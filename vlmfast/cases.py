"""How an op is tested and timed: vlmfast/ops/<family>/cases.py holds the `Cases` of each op, under the op's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

Args = tuple[Any, ...]
Samples = Iterator[Args]
Workloads = Iterator[tuple[str, Args]]
# Takes the op's arguments, builds what the call needs (a module, a graph), and returns the call itself.
Preparation = Callable[..., Callable[[], Any]]
# An argument, a value in its place that must be refused, the error's type and a piece of its message.
BadCall = tuple[str, Any, type[Exception], str]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The calls of one op, what they cost, and what else computes the same.

    `bytes` counts each operand read once and each result written once. Where an op takes two launches, what the first
    one leaves for the second (indexes, orders, slots, partial sums of a weight's gradient) is written and read.
    tests/ops/test_traffic.py holds what the kernels really move against it.
    """

    samples: Callable[[str, torch.dtype], Iterable[Args]]  # (device, dtype) -> calls for the tests
    good_call: Mapping[str, Any]  # a call that each of `bad_calls` spoils
    bad_calls: Iterable[BadCall]  # besides tensors of another kind, which one test puts in the place of each
    workloads: Callable[[str, torch.dtype], Iterable[tuple[str, Args]]]  # real shapes to time
    bytes: Callable[..., int]  # the least memory traffic of a call
    flops: Callable[..., int] | None = None  # its floating-point operations; None of what is only moved or ordered
    upstream: Preparation | None = None  # the Hugging Face code that the op replaces
    # Whether the native CPU kernels give the bits of `upstream` in every layout. An exponential or a tanh is another in
    # torch's vectors than in its rests of them, and where elements are not adjacent.
    same_bits: bool = True
    peers: Mapping[str, Preparation] = field(default_factory=dict)  # other ways to compute the same, to time against
    projects: Mapping[str, Preparation] = field(default_factory=dict)  # peers of the projects in benchmarks/peers.py
    # Layers around a call as they stand in a model, of "vlmfast" and of its peers, to compile and time
    layers: Mapping[str, Preparation] = field(default_factory=dict)
    limits: Mapping[str, Preparation] = field(default_factory=dict)  # less work than any way takes, to time against
    launches: int | Mapping[str, int] = 1  # kernels of a call; by backend where that differs
    requested: float = 1.1  # the most bytes that all lanes ask for, in units of `bytes`: caches serve the rest
    compute_bound: str | None = None  # why memory traffic does not bound the op, and is not counted


def derived(cases: Cases, change: Callable[..., Args], **fields: Any) -> Cases:
    """Make the cases of an op whose calls are made of another's, as those of its backward are.

    Args:
        cases: those of the other op.
        change: makes a call of this op, given the arguments of a call of the other.
        **fields: all others of `Cases`; `samples` or `workloads` too, where they are not made by ``change``.
    """

    def samples(device: str, dtype: torch.dtype) -> Samples:
        return (change(*args) for args in cases.samples(device, dtype))

    def workloads(device: str, dtype: torch.dtype) -> Workloads:
        return ((label, change(*args)) for label, args in cases.workloads(device, dtype))

    return Cases(**{"samples": samples, "workloads": workloads, **fields})


def named(function: Any, args: Args) -> SimpleNamespace:
    """Name the arguments of an op's call, with the defaults of those left out."""
    names, defaults = function.op.parameters
    return SimpleNamespace(**dict(zip(names, (*args, *defaults[len(args) :]), strict=True)))


def row_bytes(x: torch.Tensor) -> int:
    """Return the bytes of one row of the last dimension."""
    return x.shape[-1] * x.element_size()


def partial_sums_bytes(x: torch.Tensor, columns: int, rows: int) -> int:
    """Return the bytes of the float32 rows that a persistent kernel's blocks leave: two blocks per multiprocessor."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return 8 * columns * min(rows, 2 * multiprocessors)
