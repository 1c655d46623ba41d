"""How an op is tested and timed: vlmfast/ops/<family>/cases.py holds the `Cases` of each op, under the op's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Args = tuple[Any, ...]
Samples = Iterator[Args]
Workloads = Iterator[tuple[str, Args]]
# Takes the op's arguments, builds what the call needs (a module, a graph), and returns the call itself.
Preparation = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class BadCall:
    """A call that must be refused: the arguments, the error's type and a piece of its message."""

    args: Args
    error: type[Exception]
    message: str


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The calls of one op, what they cost, and what else computes the same.

    `bytes` counts each operand read once and each result written once. Where an op takes two launches, what the first
    one leaves for the second (indexes, orders, slots, partial sums of a weight's gradient) is written and read.
    tests/ops/test_traffic.py holds what the kernels really move against it.
    """

    samples: Callable[[str, torch.dtype], Iterable[Args]]  # (device, dtype) -> calls for the tests
    bad_calls: Callable[[], Iterable[BadCall]]
    workloads: Callable[[str, torch.dtype], Iterable[tuple[str, Args]]]  # real shapes to time
    bytes: Callable[..., int]  # the least memory traffic of a call
    flops: Callable[..., int] | None = None  # its floating-point operations; None of what is only moved or ordered
    upstream: Preparation | None = None  # the Hugging Face code that the op replaces
    peers: Mapping[str, Preparation] = field(default_factory=dict)  # other ways to compute the same, to time against
    limits: Mapping[str, Preparation] = field(default_factory=dict)  # less work than any way takes, to time against
    launches: int | Mapping[str, int] = 1  # kernels of a call; by backend where that differs
    requested: float = 1.1  # the most bytes that all lanes ask for, in units of `bytes`: caches serve the rest
    compute_bound: str | None = None  # why memory traffic does not bound the op, and is not counted


def row_bytes(x: torch.Tensor) -> int:
    """Return the bytes of one row of the last dimension."""
    return x.shape[-1] * x.element_size()


def partial_sums_bytes(x: torch.Tensor, columns: int, rows: int) -> int:
    """Return the bytes of the float32 rows that a persistent kernel's blocks leave: two blocks per multiprocessor."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return 8 * columns * min(rows, 2 * multiprocessors)
