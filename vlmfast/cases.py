"""The `Cases` by which an op is tested and timed. vlmfast/ops/<family>/cases.py has one per op, under the op's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

Args = tuple[Any, ...]
Samples = Iterator[Args]
Workloads = Iterator[tuple[str, Args]]
# Takes the arguments of the op, builds what the call needs (a module, a graph), and returns the call.
Preparation = Callable[..., Callable[[], Any]]
# An argument, a value of it that must be refused, the type of the error, and a part of its message.
BadCall = tuple[str, Any, type[Exception], str]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The calls of one op, what they cost, and what else computes the same.

    `bytes` counts each operand once as read and each result once as written. If an op has two launches, what the first
    leaves for the second (indexes, orders, slots, partial sums of a weight's gradient) counts as written and as read.
    tests/ops/test_traffic.py compares it with the bytes that the kernels move.
    """

    samples: Callable[[str, torch.dtype], Iterable[Args]]  # (device, dtype) -> calls for the tests
    good_call: Mapping[str, Any]  # a valid call, of which each of `bad_calls` changes one argument
    bad_calls: Iterable[BadCall]  # tensors of other kinds are not listed: a test tries them for every argument
    workloads: Callable[[str, torch.dtype], Iterable[tuple[str, Args]]]  # real shapes to time
    bytes: Callable[..., int]  # the least memory traffic of a call
    flops: Callable[..., int] | None = None  # its floating-point operations; None if data are only moved or ordered
    upstream: Preparation | None = None  # the Hugging Face code that the op replaces
    # Whether the native CPU kernels are bit-identical to `upstream` in every layout. They are not with an exponential
    # or a tanh: torch uses another one for the elements that fill no vector, and for elements that are not adjacent.
    same_bits: bool = True
    peers: Mapping[str, Preparation] = field(default_factory=dict)  # other ways to compute the same, to time against
    projects: Mapping[str, Preparation] = field(default_factory=dict)  # peers of the projects in benchmarks/peers.py
    # The layers around a call as in a model, with "vlmfast" and with each peer, to compile and time
    layers: Mapping[str, Preparation] = field(default_factory=dict)
    limits: Mapping[str, Preparation] = field(default_factory=dict)  # lower bounds of the work, to time against
    launches: int | Mapping[str, int] = 1  # kernels of a call; per backend if that differs
    requested: float = 1.1  # the most bytes that lanes load and store, in units of `bytes`; caches serve the excess
    compute_bound: str | None = None  # why memory traffic does not bound the op, and is not counted


def derived(cases: Cases, change: Callable[..., Args], **fields: Any) -> Cases:
    """Make the cases of an op whose calls are derived from those of another, such as its forward.

    Args:
        cases: the cases of the other op.
        change: makes the arguments of this op from those of a call of the other.
        **fields: the remaining fields of `Cases`; also `samples` or `workloads`, if ``change`` does not make them.
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


def multiprocessors(x: torch.Tensor) -> int:
    """Return the multiprocessors of the GPU of a tensor, and one of a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def partial_sums_bytes(x: torch.Tensor, columns: int, rows: int) -> int:
    """Return the bytes of a persistent kernel's float32 partial sums, with two blocks per multiprocessor."""
    return 8 * columns * min(rows, 2 * multiprocessors(x))
