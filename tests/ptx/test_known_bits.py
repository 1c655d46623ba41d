"""`KnownBits` holds in every launch, and changes that it calls equivalent are equivalent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.cases import calls, run, runnable
from tests.ptx import backend
from tests.ptx.known_bits import KnownBits
from tests.ptx.machine import Machine
from tests.ptx.parse import Instruction, Kernel, PtxError, parse
from tests.ptx.registers import Writer
from tests.ptx.small import BEGIN, module
from vlmfast.registry import OPS


class Watching(Machine):
    """Checks every number that is written against the known bits of its register."""

    def __init__(self, kernel: Kernel) -> None:
        self.known = KnownBits(kernel).known
        self.looked_at = 0
        super().__init__(kernel)

    def target(self, text: str) -> Writer:
        write, bits = super().target(text), self.known.get(text, [])
        ones, zeros = (sum(1 << place for place, bit in enumerate(bits) if bit == value) for value in (1, 0))

        def checked(value: np.ndarray) -> None:
            write(value)
            if ones or zeros:
                held = value if self.mask is None or value.size == 1 else value[self.mask]
                held = held.astype(np.uint64)
                assert not (held & np.uint64(zeros)).any(), f"{text} is not what it is known to be"
                assert not (~held & np.uint64(ones)).any(), f"{text} is not what it is known to be"
                self.looked_at += 1

        return checked


@pytest.mark.ptx
@pytest.mark.parametrize("name", ["row_index", "rms_norm", "compact_tokens"])
def test_known_bits_are_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    monkeypatch.setattr(backend, "machines", {})
    every = runnable(op, "ptx_sm_90", calls(op, "cpu", torch.bfloat16))
    for args in every:  # a first round finds out which arguments are multiples of 16
        run(op, "ptx_sm_90", args)
    watching = {key: Watching(machine.kernel) for key, machine in backend.machines.items()}
    monkeypatch.setattr(backend, "machines", watching)
    for args in every:
        run(op, "ptx_sm_90", args)
    assert sum(machine.looked_at for machine in watching.values()) > 1000


# (code before, instruction, changed instruction, whether they are equivalent). %r0: a thread's number below 64; %r2:
# 4 * %r0; %r6: an argument that is a multiple of 16; %r7: one that need not be.
PAIRS = [
    ("", "and.b32 %r10, %r2, 252", "and.b32 %r10, %r2, 255", True),
    ("", "and.b32 %r10, %r2, 252", "and.b32 %r10, %r2, 248", False),
    ("", "or.b32 %r10, %r2, 3", "add.s32 %r10, %r2, 3", True),
    ("", "or.b32 %r10, %r2, 4", "add.s32 %r10, %r2, 4", False),
    ("", "bfe.u32 %r10, %r0, 5, 1", "bfe.u32 %r10, %r0, 5, 2", True),
    ("", "bfe.u32 %r10, %r0, 4, 1", "bfe.u32 %r10, %r0, 4, 2", False),
    ("shr.s32 %r11, %r7, 31;", "add.s32 %r10, %r7, %r11", "sub.s32 %r10, %r7, %r11", True),
    ("shr.s32 %r11, %r7, 30;", "add.s32 %r10, %r7, %r11", "sub.s32 %r10, %r7, %r11", False),
    ("", "prmt.b32 %r10, %r7, 0, 0x7732", "prmt.b32 %r10, %r7, 1, 0x7732", True),
    ("", "prmt.b32 %r10, %r7, 0, 0x4432", "prmt.b32 %r10, %r7, 1, 0x4432", False),
    ("", "setp.lt.s32 %p1, %r6, 1", "setp.le.s32 %p1, %r6, 15", True),
    ("", "setp.lt.s32 %p1, %r6, 1", "setp.le.s32 %p1, %r6, 16", False),
    ("", "setp.lt.s32 %p1, %r7, 1", "setp.le.s32 %p1, %r7, 1", False),
    ("or.b32 %r11, %r2, 1;", "setp.gt.s32 %p1, %r11, %r6", "setp.ge.s32 %p1, %r11, %r6", True),
    ("", "setp.gt.s32 %p1, %r2, %r6", "setp.ge.s32 %p1, %r2, %r6", False),
    ("@%p2 mov.u32 %r2, 1;", "and.b32 %r10, %r2, 252", "and.b32 %r10, %r2, 255", False),
]


@pytest.mark.parametrize(("before", "was", "changed", "same"), PAIRS, ids=[f"{p[1]} as {p[2]}" for p in PAIRS])
def test_changes_that_are_none(before: str, was: str, changed: str, same: bool) -> None:
    def kernel(text: str) -> tuple[Kernel, Instruction]:
        body = f"{BEGIN} ld.param.b32 %r6, [c]; ld.param.b32 %r7, [d]; {before} {text}; ret;"
        found = parse(module(body).replace(".param .u64 b)", ".param .u64 b, .param .u32 c, .param .u32 d)"), "kernel")
        found.divisible.intersection_update({"c"})
        return found, found.instructions[-2]

    (one, was_), (_, changed_) = kernel(was), kernel(changed)
    assert KnownBits(one).same(was_, changed_) == same


def test_no_argument_is_negative() -> None:
    kernel = parse(module("ret;"), "kernel")
    assert backend.pack(kernel, [1, 2]) == bytes([1, *[0] * 7, 2, *[0] * 7])
    with pytest.raises(PtxError, match="kernel: an argument of a launch is negative, -2"):
        backend.pack(kernel, [1, -2])
