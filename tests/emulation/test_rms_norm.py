"""The CUDA kernels under the emulation's eyes, and the emulation itself: it must notice what it exists to notice."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation import build
from tests.emulation.backend import check_library, open_library
from tests.helpers import cases
from tests.ops.test_generated import assert_within
from vlmfast.registry import OPS, Op

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

SCHEDULES = (0, 1, 7)  # the threads and blocks forward, backward, shuffled
Ops = Any  # torch.ops.<library>


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---- the emulation against the programming guide ----


@pytest.fixture(scope="module")
def selftest() -> ctypes.CDLL:
    return open_library(build.build("check", sources=[build.HERE / "selftest.cu"]))


@pytest.fixture
def exchange(selftest: ctypes.CDLL) -> Iterator[Callable[..., list[int]]]:
    out = torch.empty(64, dtype=torch.int32)
    selftest.vlmfast_emulation_allow(out.data_ptr(), 1, 256, 256, 1)

    def run(kind: int, width: int = 32, argument: int = 0) -> list[int]:
        code = selftest.selftest_exchange(kind, width, argument, pointer(out))
        assert code == 0, selftest.vlmfast_emulation_error()
        values: list[int] = out.tolist()
        return values

    yield run
    selftest.vlmfast_emulation_forbid_all()


def shuffle_source(kind: int, lane: int, width: int, argument: int) -> int:
    """The lane that a shuffle reads, from the programming guide."""
    first = lane - lane % width
    if kind == 0:
        return first + argument % width
    if kind == 1:
        return lane - argument if lane - argument >= first else lane
    if kind == 2:
        return lane + argument if lane + argument < first + width else lane
    return lane ^ argument if lane ^ argument < first + width else lane


@pytest.mark.parametrize("kind", range(4), ids=["index", "up", "down", "xor"])
def test_shuffles(exchange: Callable[..., list[int]], kind: int) -> None:
    for width, argument in itertools.product((1, 2, 8, 16, 32), (0, 1, 2, 5, 8, 16, 31)):
        expected = [100 + t - t % 32 + shuffle_source(kind, t % 32, width, argument) for t in range(64)]
        assert exchange(kind, width, argument) == expected, (width, argument)


def test_votes_and_reductions(exchange: Callable[..., list[int]]) -> None:
    ballots = [sum(1 << lane for lane in range(32) if (first + lane) % 3 == 0) for first in (0, 32)]
    assert [value % 2**32 for value in exchange(4)] == [ballots[0]] * 32 + [ballots[1]] * 32
    assert exchange(5) == [0] * 32 + [1] * 32  # any
    assert exchange(6) == [1] * 32 + [0] * 32  # all
    assert exchange(7) == [sum(range(100, 132))] * 32 + [sum(range(132, 164))] * 32
    assert exchange(8) == [-100] * 32 + [-132] * 32  # signed maximum
    assert exchange(9) == [100 + t - t % 16 for t in range(64)]  # minimum of half warps
    assert [value % 2**32 for value in exchange(10)] == [0x11111111 << t % 4 for t in range(64)]
    assert exchange(11) == [32] * 64  # __syncthreads_count


UNORDERED_READ = "race: read of shared|that nobody has written"  # who comes first depends on the schedule
RULES = [
    ("barrier", 0, UNORDERED_READ),
    ("barrier", 1, UNORDERED_READ),
    ("barrier", 2, UNORDERED_READ),
    ("barrier", 3, "divergent barrier"),
    ("barrier", 4, "divergent barrier"),
    ("barrier", 5, "which takes no part"),
    ("barrier", 6, "is not in its own mask"),
    ("barrier", 7, "which takes no part"),
    ("barrier", 8, "race: (write|read) of shared"),
    ("memory", 0, "that nobody has written"),
    ("memory", 1, "of dynamic shared memory, which has 256"),
    ("memory", 2, "out_of_bounds"),
    ("memory", 3, "of an input of"),
    ("memory", 4, "write to an input"),
    ("memory", 5, "of an input of"),
    ("memory", 6, "type_mismatch"),
    ("memory", 7, "race: (write|read) of shared"),
    ("memory", 8, "race: write of global"),
    ("memory", 9, "of an (in|out)put of"),
    ("last_block", 0, "race: read of global"),
]


@pytest.mark.parametrize(("group", "rule", "message"), RULES, ids=[f"{group}-{rule}" for group, rule, _ in RULES])
def test_rules(selftest: ctypes.CDLL, group: str, rule: int, message: str) -> None:
    rows = (4, 64, 128) if (group, rule) == ("memory", 5) else (1, 256, 256)  # count, bytes, pitch
    for broken, schedule in itertools.product((False, True), SCHEDULES):
        data, out = torch.zeros(128, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        selftest.vlmfast_emulation_schedule(schedule)
        selftest.vlmfast_emulation_allow(data.data_ptr(), *rows, 0)
        selftest.vlmfast_emulation_allow(out.data_ptr(), 1, 256, 256, 1)
        code = getattr(selftest, f"selftest_{group}")(rule, int(broken), pointer(data), pointer(out))
        text = selftest.vlmfast_emulation_error().decode()
        selftest.vlmfast_emulation_forbid_all()
        selftest.vlmfast_emulation_schedule(0)
        if not broken:
            assert code == 0, text
        else:
            assert code != 0
            assert re.search(message, text), text
            assert "selftest.cu:" in text, text
        if group == "last_block" and not broken:
            assert out[21] == sum(range(1, 21))


def test_conversions_round_as_torch(selftest: ctypes.CDLL) -> None:
    upper = torch.arange(65536, dtype=torch.int32) << 16  # every bfloat16, and what lies half way to the next one
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float().view(torch.int32)
    bits = torch.cat([upper, upper | 0x8000, upper | 0x7FFF, upper | 0x8001, halves | 0x1000, halves | 0x1001])
    values = bits.view(torch.float32)
    half, bfloat16 = torch.empty_like(values, dtype=torch.float16), torch.empty_like(values, dtype=torch.bfloat16)
    from_half, from_bfloat16 = torch.empty_like(values), torch.empty_like(values)
    tensors = (values, half, bfloat16, from_half, from_bfloat16)
    for tensor in tensors:
        selftest.vlmfast_emulation_allow(tensor.data_ptr(), 1, tensor.nbytes, tensor.nbytes, tensor is not values)
    code = selftest.selftest_convert(*map(pointer, tensors), values.numel())
    selftest.vlmfast_emulation_forbid_all()
    assert code == 0, selftest.vlmfast_emulation_error()
    for result, expected in ((half, values.half()), (bfloat16, values.bfloat16())):
        assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(torch.signbit(result), torch.signbit(expected)) or result.isnan().any()
    assert torch.equal(from_half.nan_to_num(7.0), half.float().nan_to_num(7.0))
    assert torch.equal(from_bfloat16.nan_to_num(7.0), bfloat16.float().nan_to_num(7.0))


# ---- the kernels, each access looked at ----

# (rows, columns): one pair for each policy of csrc/rms_norm/cuda.cu, with rows and columns that fill neither blocks nor
# vectors, and more rows than the emulation's small grids take at once.
SHAPES = [(1, 8), (100, 72), (3, 7), (25, 264), (5, 33), (9, 600), (7, 70), (7, 1032), (3, 129), (2, 8208), (2, 1030)]


# Of the first and the second operand: rows that vectors fit and rows that they do not.
LAYOUTS = [
    (cases.padded, cases.contiguous),
    (cases.contiguous, cases.expanded),
    (cases.padded, cases.offset),
    (cases.oddly_padded, cases.padded),
]


def kernel_calls(op: Op, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Calls of an RMSNorm op in every shape and layout, the other arguments in turn."""
    for index, ((rows, columns), layouts) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        x, other = (layout(torch.randn(rows, columns).to(dtype)) for layout in layouts)
        inputs = {"rms_norm": (x,), "add_rms_norm": (x, other), "rms_norm_backward": (other, x)}[op.name]
        tail = (torch.randn(rows, columns).to(dtype) if index % 3 else None, index % 4 > 0)
        weight, settings = torch.randn(columns).to(dtype), ((1e-6, 0.3)[index % 2], ("llama", "gemma")[index // 2 % 2])
        yield *inputs, weight, *settings, *(tail if op.name == "rms_norm_backward" else ())


def far_rows() -> Tensor:
    """Three rows whose offsets, in elements, pass 2 ** 31: in memory that nobody else touches, so it takes none."""
    gap, columns = 2**30, 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * gap + columns)), dtype=torch.bfloat16)
    return memory.as_strided((3, columns), (gap, 1)).copy_(torch.randn(3, columns))


def examine(library: str, dtypes: Iterable[torch.dtype]) -> None:
    """Raise where a build of the RMSNorm kernels touches what it must not, or is wrong."""
    kernels = getattr(torch.ops, library)
    x, weight = far_rows(), torch.randn(64).bfloat16()
    for name, tensors in (("rms_norm", (x,)), ("add_rms_norm", (x, x)), ("rms_norm_backward", (x, x))):
        got, reference = (cases.outputs(f(*tensors, weight)) for f in (getattr(kernels, name), OPS[name].reference))
        assert_within(got, reference, cases.outputs(OPS[name].reference(*cases.widened((*tensors, weight)))))
    for name, dtype in itertools.product(("rms_norm", "add_rms_norm", "rms_norm_backward"), dtypes):
        op = OPS[name]
        kernel = getattr(kernels, name)
        differ = total = 0
        for args in kernel_calls(op, dtype):
            got, reference = cases.outputs(kernel(*args)), cases.outputs(op.reference(*args))
            assert_within(got, reference, cases.outputs(op.reference(*cases.widened(args))))
            differ += sum(int((g != r).sum()) for g, r in zip(got, reference, strict=True))
            total += sum(g.numel() for g in got)
        if dtype != torch.float32:
            assert differ <= total // 500, f"{name}: {differ} of {total} elements are rounded in another order"


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return check_library("rms_norm")


@pytest.mark.parametrize(("dtype", "schedule"), zip(cases.DTYPES, SCHEDULES, strict=True), ids=str)
def test_rms_norm(checked: ctypes.CDLL, dtype: torch.dtype, schedule: int) -> None:
    checked.vlmfast_emulation_schedule(schedule)
    examine("vlmfast_checked_rms_norm", [dtype])


def traffic_of(library: ctypes.CDLL, ops: Ops, name: str, *args: Any) -> tuple[int, int, int]:
    """What a call launches, loads and stores."""
    before, after = (ctypes.c_uint64 * 4)(), (ctypes.c_uint64 * 4)()
    library.vlmfast_emulation_counters(before)
    getattr(ops, name)(*args)
    library.vlmfast_emulation_counters(after)
    launches, _, loaded, stored = (b - a for a, b in zip(before, after, strict=True))
    return launches, loaded, stored


def test_bytes_moved(checked: ctypes.CDLL) -> None:
    """The memory traffic that the header of csrc/rms_norm/cuda.cu promises, and the number of launches."""
    x, weight = torch.randn(7, 1032).bfloat16(), torch.randn(1032).bfloat16()
    traffic = functools.partial(traffic_of, checked, torch.ops.vlmfast_checked_rms_norm)
    assert traffic("rms_norm", x, weight) == (1, x.nbytes + 7 * weight.nbytes, x.nbytes)
    assert traffic("add_rms_norm", x, x, weight) == (1, 2 * x.nbytes + 7 * weight.nbytes, 2 * x.nbytes)
    frozen = traffic("rms_norm_backward", x, x, weight, 1e-6, "llama", None, False)
    assert frozen == (1, 2 * x.nbytes + 14 * weight.nbytes, x.nbytes)
    partials = 2 * 1032 * 4  # of two persistent blocks
    assert traffic("rms_norm_backward", x, x, weight) == (2, frozen[1] + partials, frozen[2] + partials + weight.nbytes)


# ---- planted faults: what the tests above are worth ----


@dataclass(frozen=True)
class Fault:
    """An edit of the sources that must not go unnoticed, and what notices it."""

    name: str
    file: str
    old: str
    new: str
    notice: str


RACE, BOUNDS, MISALIGNED = "race: ", "of an (in|out)put of", "misaligned|type_mismatch"
WRONG = "over the budget|isnan|in another order"
FAULTS = [
    Fault("barrier missing", "common.cuh", "      __syncthreads();\n", "", "nobody has written"),
    Fault("one buffer for two barriers", "common.cuh", "warp_sums[turn % 2]", "warp_sums[0]", RACE),
    Fault(
        "barrier missing in the partial sums",
        "column_sums.cuh",
        "    __syncthreads();\n",
        "",
        "nobody has written",
    ),
    Fault("reduction step missing", "common.cuh", "offset > 0;", "offset > 1;", WRONG),
    Fault("shuffle group too narrow", "common.cuh", "offset, kLanes)", "offset, kLanes / 2)", WRONG),
    Fault("last vector off by one", "row_policy.cuh", "if (column < end)", "if (column <= end)", BOUNDS),
    Fault("end of a long row left out", "row_policy.cuh", "column = first() + kColumns;", "column = end;", WRONG),
    Fault(
        "row stride of another tensor",
        "cuda.cu",
        "row * residual_stride",
        "row * x_stride",
        f"{BOUNDS}|{RACE}",
    ),
    Fault("row mask missing", "cuda.cu", "row < rows ? hidden : 0", "hidden", BOUNDS),
    Fault(
        "idle threads leave",
        "cuda.cu",
        "row < rows ? hidden : 0;",
        "hidden; if (row >= rows) return;",
        "diverg",
    ),
    Fault("32-bit row offset", "cuda.cu", "x + row * x_stride", "x + int(row) * int(x_stride)", "overflow"),
    Fault("alignment of strides unchecked", "cuda_torch.h", "stride * sizeof(scalar_t) %", "0 %", MISALIGNED),
    Fault(
        "alignment of pointers unchecked",
        "cuda_torch.h",
        "reinterpret_cast<uintptr_t>(data) %",
        "0 %",
        MISALIGNED,
    ),
    Fault("two blocks, one partial sum", "cuda.cu", "{blockIdx.x} * hidden;", "{blockIdx.x / 2} * hidden;", RACE),
    Fault("accumulator not cleared", "cuda.cu", "[kVec] = {};", "[kVec];", WRONG),
    Fault("rounding of llama left out", "cuda.cu", "round_to<scalar_t>(normed)", "normed", WRONG),
    Fault("1 of gemma left out", "cuda.cu", "1.f + weight : weight", "weight : weight", WRONG),
    Fault("eps left out", "cuda.cu", "hidden + eps)", "hidden)", WRONG),
]


def plant(fault: Fault, stem: str, into: Path) -> Path:
    """A copy of one family with the fault in it, and with bfloat16 kernels alone: a third of the time to compile."""
    for source in build.CSRC.glob("*/*.*"):
        if source.suffix == ".cpp" or (source.suffix == ".cu" and source.parent.name != stem):
            continue
        name, text = str(source.relative_to(build.CSRC)), source.read_text()
        if source.name == fault.file:
            assert fault.old in text, f"{fault.file} has changed: nowhere to plant the fault"
            text = text.replace(fault.old, fault.new)
        for dtype in ("float", "__half"):
            text = text.replace(f"return function({dtype}());", "return;")
        (into / name).parent.mkdir(exist_ok=True)
        (into / name).write_text(text)
    return into


@pytest.mark.planted
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(tmp_path: Path, index: int) -> None:
    library = f"vlmfast_fault_{index}"
    planted = plant(FAULTS[index], "rms_norm", tmp_path)
    torch.ops.load_library(str(build.build("check", library=library, csrc=planted, cache=tmp_path)))
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[index].notice):
        examine(library, [torch.bfloat16])
