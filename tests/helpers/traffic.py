"""Count the launches of a call and the bytes that its kernels move, where every load and store can be seen.

    TRITON_INTERPRET=1 python -m tests.helpers.traffic > traffic.json

The calls run under Triton's interpreter and under the CUDA emulation. There are two counts:

* `distinct` counts each byte of global memory once per launch for loads and once for stores. This is what DRAM sees if
  a cache holds what a launch reads again, such as a weight that multiplies every row. Bytes that one launch writes and
  the next one reads (indexes, partial sums) count both times, and so does an input that two launches read.
* `requested` counts the bytes of every unmasked lane each time. A row that is read twice counts twice, and a number
  that eight threads read counts eight times.

A GPU loads whole sectors of 32 bytes. Rows that do not fill a sector are counted as if it did not.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import vlmfast
from tests.emulation import build
from tests.emulation.backend import check_library, check_loader, checked_name
from vlmfast import backends
from vlmfast.benchmarks.candidates import CANDIDATES
from vlmfast.registry import OPS, Op

BACKENDS = ("triton", "emulated")
ENOUGH = 1e6  # bytes of a call, so many that the fixed accesses of a launch do not matter
BOUND_BY_MEMORY = [op for op in OPS.values() if op.cases.compute_bound is None]


@dataclass(frozen=True)
class Traffic:
    """The bytes that a call moves, and its launches."""

    launches: int
    distinct: int
    requested: int


def workload(op: Op) -> tuple[str, tuple[Any, ...]]:
    """Return the label and arguments of a bfloat16 workload that moves `ENOUGH` bytes, or of the largest one.

    If the first image of a batch is enough, only that one is used: Triton's interpreter would take a minute for five.
    """
    label, args = "", ()
    for label, args in op.cases.workloads("cpu", torch.bfloat16):
        batch = args[0].shape[0]
        first = tuple(a[:1] if isinstance(a, Tensor) and a.shape[0] == batch else a for a in args)
        if batch > 1 and op.cases.bytes(*first) >= ENOUGH:
            return f"1 of {label}", first
        if op.cases.bytes(*args) >= ENOUGH:
            break
    return label, args


def has_kernels(op: Op, backend: str) -> bool:
    """Tell whether the op has kernels on the backend whose traffic can be counted."""
    return backend != "emulated" or (build.CSRC / op.family / "cuda.cu").exists()


def count(op: Op, backend: str, args: tuple[Any, ...]) -> Traffic:
    """Run one call on a backend, and count its traffic."""
    return {"triton": _interpreted, "emulated": _emulated}[backend](op, args)


# ---- CUDA ----


def _emulated(op: Op, args: tuple[Any, ...]) -> Traffic:
    alone = all(a.dtype == torch.bfloat16 for a in args if isinstance(a, Tensor) and a.is_floating_point())
    library, name = check_library(op.family, alone), checked_name(alone)
    library.vlmfast_emulation_schedule(0)
    loader = functools.partial(check_loader, bfloat16_alone=alone)
    with mock.patch.dict(backends.LOADERS, {name: loader}), vlmfast.use(name):
        before = _counters(library)
        op.function(*args)
        launches, _, loaded, stored, *distinct = (a - b for a, b in zip(_counters(library), before, strict=True))
    return Traffic(launches, sum(distinct), loaded + stored)


def _counters(library: ctypes.CDLL) -> list[int]:
    accesses, distinct = (ctypes.c_uint64 * 4)(), (ctypes.c_uint64 * 2)()
    library.vlmfast_emulation_counters(accesses)
    library.vlmfast_emulation_distinct(distinct)
    return [*accesses, *distinct]


# ---- Triton ----


class _Launch:
    """Which bytes of its tensors one launch has loaded and stored."""

    def __init__(self, tensors: list[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.begin = np.array(sorted(storages), dtype=np.int64)
        sizes = np.array([storages[int(begin)] for begin in self.begin], dtype=np.int64)
        self.end = self.begin + sizes
        self.shift = self.begin - np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.touched = {kind: np.zeros(int(sizes.sum()), dtype=bool) for kind in ("loaded", "stored")}
        self.requested = 0

    def access(self, kind: str, pointers: Any, mask: np.ndarray) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1  # a bool has one bit and takes a byte
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
        self.requested += size * addresses.size
        if addresses.size == 0:
            return
        breaks = np.flatnonzero(np.diff(addresses) != size)  # few: neighbouring lanes mostly have adjacent addresses
        first, last = addresses[np.concatenate([[0], breaks + 1])], addresses[np.concatenate([breaks, [-1]])]
        owner = np.searchsorted(self.begin, first, side="right") - 1
        assert (owner >= 0).all(), "an access before all tensors"
        assert (last + size <= self.end[owner]).all(), "an access behind the end of a tensor"
        for begin, end in zip(first - self.shift[owner], last + size - self.shift[owner], strict=True):
            self.touched[kind][begin:end] = True

    def distinct(self) -> int:
        return sum(int(touched.sum()) for touched in self.touched.values())


@contextmanager
def watched() -> Iterator[list[_Launch]]:
    """Record the accesses of each launch in the block."""
    from triton.runtime import interpreter

    launches: list[_Launch] = []
    builder, execute = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(_Launch([a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]))
        execute(executor, *args, **kwargs)

    def watch(name: str, kinds: tuple[str, ...], mask_at: int | None) -> Any:
        original: Callable[..., Any] = getattr(builder, name)

        @functools.wraps(original)
        def access(*args: Any) -> Any:
            pointers = args[1] if name == "create_atomic_rmw" else args[0]
            mask = np.True_ if mask_at is None else args[mask_at].data
            for kind in kinds:
                launches[-1].access(kind, pointers, mask)
            return original(*args)

        return mock.patch.object(builder, name, access)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        watch("create_masked_load", ("loaded",), 1),  # loads without a mask end there too
        watch("create_masked_store", ("stored",), 2),
        watch("create_atomic_rmw", ("loaded", "stored"), 3),
        watch("create_atomic_cas", ("loaded", "stored"), None),
    ):
        yield launches


def _interpreted(op: Op, args: tuple[Any, ...]) -> Traffic:
    with watched() as launches, vlmfast.use("triton"):
        op.function(*args)
    return total(launches)


def total(launches: list[_Launch]) -> Traffic:
    """Return the sums over all launches."""
    return Traffic(len(launches), sum(one.distinct() for one in launches), sum(one.requested for one in launches))


def main() -> None:
    """Write the traffic of every memory-bound op as JSON, as ratios to `op.cases.bytes`."""
    from tests.helpers import interpreter

    interpreter.repair()
    torch.manual_seed(0)
    records = []
    for op in [*BOUND_BY_MEMORY, *CANDIDATES.values()]:
        label, args = workload(op)
        budget = op.cases.bytes(*args)
        for backend in (name for name in BACKENDS if has_kernels(op, name)):
            moved = count(op, backend, args)
            ratios = {"ratio": round(moved.distinct / budget, 4), "requested_ratio": round(moved.requested / budget, 4)}
            counted = {"launches": moved.launches, "counted_bytes": moved.distinct, "op_bytes": budget, **ratios}
            name = "cuda" if backend == "emulated" else backend
            records.append({"op": op.name, "backend": name, "workload": label, "dtype": "bfloat16", **counted})
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
