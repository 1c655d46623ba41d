"""The emulation against the rules of the CUDA programming guide: it must notice every violation."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.emulation import build
from tests.emulation.backend import open_library
from tests.emulation.harness import FAULTS, SCHEDULES, UNORDERED, places_of


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


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
    """Return the lane that a shuffle reads, according to the programming guide."""
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


RULES = [
    ("barrier", 0, UNORDERED),
    ("barrier", 1, UNORDERED),
    ("barrier", 2, UNORDERED),
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
    upper = torch.arange(65536, dtype=torch.int32) << 16  # every bfloat16; below, also numbers half way to the next
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


def test_every_fault_has_a_place():
    """Each fault's text is still in the sources; `make test-faults` plants them, since each needs a compilation."""
    for path in build.HERE.glob("test_*.py"):
        importlib.import_module(f"tests.emulation.{path.stem}")
    assert sum(map(len, FAULTS.values())) > 80
    lost = [fault.name for family, faults in FAULTS.items() for fault in faults if not places_of(fault, family)]
    assert not lost
