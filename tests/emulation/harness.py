"""Common parts of the tests of emulated kernels: tensors, calls, comparisons, traffic, planted faults."""

from __future__ import annotations

import ctypes
import gc
import itertools
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation import build
from tests.emulation.backend import check_library, checked_name, open_library
from tests.helpers import cases, traffic
from tests.helpers.rounding import assert_within
from vlmfast.registry import OPS

SCHEDULES = (0, 1, 7)  # order of threads and blocks: forward, backward, shuffled
Layout = Callable[[Tensor], Tensor]
Call = tuple[str, tuple[Any, ...]]  # an op's name and its arguments

# (layout of the first tensor, layout of the others), one pair per call in turn: rows aligned for vectors of 16 bytes,
# rows for single elements, sequences with gaps between them.
PAIRS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.transposed),
    (cases.oddly_padded, cases.contiguous),
    (cases.expanded, cases.offset),
    (cases.every_other, cases.every_other),
]

# Regular expressions of the messages by which a planted fault is noticed.
RACE, BOUNDS, MISALIGNED = "race: ", "of an (in|out)put of", "misaligned|type_mismatch"
UNORDERED = f"{RACE}|nobody has written"  # which of the two is reported depends on the schedule
WRONG = "over the budget|isnan|in another order"
DIFFER = "elements differ"
UNNOTICED = "DID NOT RAISE"  # pytest's message: a call that must be refused was not


# ---- tensors and calls ----


def far_rows() -> Tensor:
    """Return three rows whose offsets, in elements, exceed 2 ** 31; the untouched pages between take no memory."""
    gap, hidden = 2**30, 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * gap + hidden)), dtype=torch.bfloat16)
    return memory.as_strided((3, hidden), (gap, 1)).copy_(torch.randn(3, hidden))


def in_gaps(x: Tensor, image_gap: int) -> Tensor:
    """Return the same map with gaps between its patches, which stay aligned for vectors, and between its images."""
    batch, patches, channels = x.shape
    pitch = channels + 16 - channels % 8
    stride = patches * pitch + image_gap
    buffer = torch.full((batch * stride,), float("nan"), dtype=x.dtype)
    return buffer.as_strided(x.shape, (stride, pitch, 1)).copy_(x)


def sample_calls(family: str, layouts: Sequence[tuple[Layout, Layout]], dtype: torch.dtype) -> Iterator[Call]:
    """Yield the samples of a family's ops, with the next pair of layouts for each."""
    for op in OPS.values():
        if op.family != family or op.compose is not None:
            continue
        for index, sample in enumerate(op.cases.samples("cpu", dtype)):
            if len({a.dtype for a in sample if cases.is_float(a)}) > 1:
                continue  # check mode is compiled for one dtype
            pair = layouts[index % len(layouts)]
            yield op.name, tuple(pair[i % 2](a) if cases.is_tensor(a) else a for i, a in enumerate(sample))


# ---- kernels ----


@dataclass(frozen=True)
class Kernels:
    """The kernels of one family, built in check mode."""

    ops: Any  # torch.ops.<library>
    library: ctypes.CDLL

    def __call__(self, name: str, *args: Any) -> tuple[Tensor, ...]:
        return cases.outputs(getattr(self.ops, name)(*args))

    def schedule(self, schedule: int) -> None:
        self.library.vlmfast_emulation_schedule(schedule)


def checked(family: str, bfloat16_alone: bool = True) -> Kernels:
    """Return the kernels of csrc/<family>, built once."""
    ops = getattr(torch.ops, f"vlmfast_{checked_name(bfloat16_alone)}_{family}")
    return Kernels(ops, check_library(family, bfloat16_alone))


def compare(kernels: Kernels, *calls: Iterable[Call], same_order: bool = False, like: Any = None) -> None:
    """Run calls and raise if they access what they must not, or differ from the definitions.

    Args:
        kernels: the build that runs them.
        calls: ops and their arguments, generated one at a time, because far rows occupy much address space.
        same_order: whether sums have the order of the definitions, so that few elements differ by a rounding.
        like: the arguments for the definition, if these differ.
    """
    differ = total = 0
    for name, args in itertools.chain(*calls):
        op, same = OPS[name], args if like is None else like
        got, reference = kernels(name, *args), cases.outputs(op.reference(*same))
        wrong = sum(int((g != r).sum()) for g, r in zip(got, reference, strict=True))
        assert not op.exact or wrong == 0, f"{name}: {wrong} elements differ"
        assert_within(got, reference, cases.outputs(op.reference(*cases.widened(same))))
        differ, total = differ + wrong, total + sum(g.numel() for g in got)
    if same_order:
        assert differ <= total // 500, f"{differ} of {total} elements are rounded in another order"


def assert_traffic(launches: int, name: str, *args: Any) -> None:
    """Check a call's launches, and that they access as many bytes as the op must move, each counted once per launch."""
    moved, budget = traffic.count(OPS[name], "emulated", args), OPS[name].cases.bytes(*args)
    assert moved.launches == launches
    assert moved.distinct == pytest.approx(budget, rel=0.01), name


# ---- tests ----

Examine = Callable[[Kernels, torch.dtype], None]


def every_access(family: str, examine: Examine) -> Callable[..., None]:
    """Make the test that examines a family's kernels in each dtype and in each order of threads."""

    pairs = [
        pytest.param(
            dtype, schedule, marks=[] if dtype == torch.bfloat16 else [pytest.mark.thorough]
        )  # most templates are the same
        for dtype, schedule in zip(cases.DTYPES, SCHEDULES, strict=True)
    ]

    @pytest.mark.parametrize(("dtype", "schedule"), pairs, ids=str)
    def test(dtype: torch.dtype, schedule: int) -> None:
        kernels = checked(family, bfloat16_alone=dtype == torch.bfloat16)
        kernels.schedule(schedule)
        examine(kernels, dtype)

    return test


@dataclass(frozen=True)
class Fault:
    """An edit of the sources that a test must notice, and the message of that test."""

    name: str
    file: str
    old: str
    new: str
    notice: str


FAULTS: dict[str, Sequence[Fault]] = {}  # family -> its faults, filled as the tests are imported


def planted_faults(family: str, examine: Examine, faults: Sequence[Fault]) -> Callable[..., None]:
    """Make the test that examines a family's kernels with each fault in turn."""
    FAULTS[family] = faults

    @pytest.mark.planted
    @pytest.mark.parametrize("fault", faults, ids=[fault.name.replace(" ", "-") for fault in faults])
    def test(fault: Fault, tmp_path: Path) -> None:
        library = f"vlmfast_{family}_{re.sub(r'[^a-z0-9]+', '_', fault.name.lower())}"
        csrc = plant(fault, family, tmp_path)
        path = build.build("check", bfloat16_alone=True, library=library, csrc=csrc, cache=tmp_path)
        torch.ops.load_library(str(path))
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception), match=fault.notice):
            examine(Kernels(getattr(torch.ops, library), open_library(path)), torch.bfloat16)
        gc.collect()  # frees tensors that the frames of the exception hold

    return test


def plant(fault: Fault, family: str, into: Path) -> Path:
    """Copy one family with the fault in it."""
    places = places_of(fault, family)
    assert places, f"{fault.file} has changed: nowhere to plant the fault"
    for source in _sources(family):
        text = source.read_text()
        if source in places:
            text = text.replace(fault.old, fault.new)
        copy = into / source.relative_to(build.CSRC)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    return into


def _sources(family: str) -> list[Path]:
    """List the sources and headers that a family's kernels may be compiled from."""
    sources = build.CSRC.glob("*/*.*")
    return [s for s in sources if s.suffix != ".cpp" and (s.suffix != ".cu" or s.parent.name == family)]


def places_of(fault: Fault, family: str) -> list[Path]:
    """Find the sources in which the fault can be planted."""
    return [s for s in _sources(family) if s.name == fault.file and fault.old in s.read_text()]
