"""The result of each instruction, against Python's integers and torch's floating-point numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.parse import PtxError
from tests.ptx.small import run

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def field(x: int, at: int, length: int) -> int:
    return (x >> (at & 0xFF)) & ((1 << (length & 0xFF)) - 1)


def quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def permuted(x: int, y: int, selector: int) -> int:
    octets, result = (y << 32 | x).to_bytes(8, "little"), 0
    for index in range(4):
        nibble = selector >> 4 * index & 15
        octet = octets[nibble & 7]
        result |= ((0xFF if octet & 0x80 else 0) if nibble & 8 else octet) << 8 * index
    return result


# Instruction with operands %r10, %r11, %r12 and result %r13 -> its function.
INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 %r13, %r10, %r11;": lambda x, y, z: x + y,
    "sub.s32 %r13, %r10, -7;": lambda x, y, z: x + 7,
    "mul.lo.s32 %r13, %r10, %r11;": lambda x, y, z: x * y,
    "mul.hi.s32 %r13, %r10, %r11;": lambda x, y, z: signed(x) * signed(y) >> 32,
    "mul.hi.u32 %r13, %r10, %r11;": lambda x, y, z: x * y >> 32,
    "mad.lo.s32 %r13, %r10, %r11, %r12;": lambda x, y, z: x * y + z,
    "mul.wide.s32 %d9, %r10, %r11; shr.u64 %d9, %d9, 32; cvt.u32.u64 %r13, %d9;": lambda x, y, z: (
        signed(x) * signed(y) >> 32
    ),
    "mul.wide.u32 %d9, %r10, %r11; mul.wide.u32 %d8, %r11, %r12; mul.hi.u64 %d9, %d9, %d8; cvt.u32.u64 %r13, %d9;": (
        lambda x, y, z: (x * y) * (y * z) >> 64
    ),
    "div.s32 %r13, %r10, %r11;": lambda x, y, z: quotient(signed(x), signed(y)),
    "div.u32 %r13, %r10, %r11;": lambda x, y, z: x // y,
    "rem.s32 %r13, %r10, %r11;": lambda x, y, z: signed(x) - quotient(signed(x), signed(y)) * signed(y),
    "min.s32 %r13, %r10, %r11;": lambda x, y, z: min(signed(x), signed(y)),
    "max.u32 %r13, %r10, %r11;": lambda x, y, z: max(x, y),
    "abs.s32 %r13, %r10;": lambda x, y, z: abs(signed(x)),
    "neg.s32 %r13, %r10;": lambda x, y, z: -x,
    "not.b32 %r13, %r10;": lambda x, y, z: ~x,
    "and.b32 %r13, %r10, %r11;": lambda x, y, z: x & y,
    "xor.b32 %r13, %r10, %r11;": lambda x, y, z: x ^ y,
    "lop3.b32 %r13, %r10, %r11, %r12, 0xE8;": lambda x, y, z: x & y | y & z | x & z,
    "shl.b32 %r13, %r10, 5;": lambda x, y, z: x << 5,
    "shl.b32 %r13, %r10, 40;": lambda x, y, z: 0,
    "and.b32 %r14, %r11, 63; shr.u32 %r13, %r10, %r14;": lambda x, y, z: x >> (y & 63),
    "and.b32 %r14, %r11, 63; shr.s32 %r13, %r10, %r14;": lambda x, y, z: signed(x) >> (y & 63),
    "shf.l.wrap.b32 %r13, %r10, %r11, %r12;": lambda x, y, z: (y << 32 | x) << (z & 31) >> 32,
    "shf.r.wrap.b32 %r13, %r10, %r11, %r12;": lambda x, y, z: (y << 32 | x) >> (z & 31),
    "and.b32 %r14, %r11, 31; bfe.u32 %r13, %r10, %r14, 9;": lambda x, y, z: field(x, y & 31, 9),
    "bfe.s32 %r13, %r10, 3, 7;": lambda x, y, z: signed(field(x, 3, 7), 7),
    "bfi.b32 %r13, %r10, %r11, 8, 12;": lambda x, y, z: y & ~(0xFFF << 8) | (x & 0xFFF) << 8,
    "prmt.b32 %r13, %r10, %r11, %r12;": permuted,
    "popc.b32 %r13, %r10;": lambda x, y, z: bin(x).count("1"),
    "clz.b32 %r13, %r10;": lambda x, y, z: 32 - x.bit_length(),
    "bfind.shiftamt.u32 %r13, %r10;": lambda x, y, z: 32 - x.bit_length() if x else -1,
    "brev.b32 %r13, %r10;": lambda x, y, z: int(f"{x:032b}"[::-1], 2),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r13, %r11, %r12, %p1;": lambda x, y, z: y if signed(x) < signed(y) else z,
    "setp.ge.u32 %p1|%p2, %r10, %r11; selp.b32 %r13, %r11, %r12, %p2;": lambda x, y, z: z if x >= y else y,
    "setp.ne.b32 %p1, %r10, 0; setp.gt.and.u32 %p2, %r11, 99, !%p1; selp.b32 %r13, 1, 2, %p2;": lambda x, y, z: (
        1 if y > 99 and x == 0 else 2
    ),
    "cvt.s32.s8 %r13, %r10;": lambda x, y, z: signed(x & 0xFF, 8),
    "cvt.u16.u32 %h1, %r10; cvt.s32.s16 %r13, %h1;": lambda x, y, z: signed(x & 0xFFFF, 16),
    "mov.b32 {%h1, %h2}, %r10; mov.b32 %r13, {%h2, %h1};": lambda x, y, z: x >> 16 | x << 16,
    "mov.b64 %d9, {%r10, %r11}; cvt.u32.u64 %r13, %d9;": lambda x, y, z: x,
    "mov.u32 %r13, %r10; @%p1 mov.u32 %r13, 5;": lambda x, y, z: x,
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text: str) -> None:
    draw = random.Random(0)
    special = [0, 1, 2, M32, M32 - 1, 1 << 31, (1 << 31) - 1, 31, 32, 33]
    values = [[draw.choice(special) if draw.random() < 0.4 else draw.getrandbits(32) for _ in range(64)] for _ in "xyz"]
    if text.startswith(("div", "rem")):
        values[1] = [y or 1 for y in values[1]]
    given = torch.from_numpy(np.array(values, np.uint32).view(np.int32))
    loads = "".join(f"ld.global.b32 %r1{i}, [%d2+{256 * i}];" for i in range(3))
    result = torch.zeros(64, dtype=torch.int32)
    run(f"setp.ne.b32 %p1, %r0, %r0; {loads} {text} st.global.b32 [%d3], %r13; ret;", given, result)
    want = [INTEGERS[text](x, y, z) & M32 for x, y, z in zip(*values, strict=True)]
    assert [x & M32 for x in result.tolist()] == want


def half(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Round inputs to a half-precision dtype, compute in float32, and round the result."""
    return lambda *values: function(*(v.to(dtype).float() for v in values)).to(dtype).float()


def packed(name: str, line: str) -> str:
    """Make PTX that rounds %r10 to %r12 into both halves of registers, applies a line, and takes the low half."""
    rounded = "".join(f"cvt.rn.{name}x2.f32 %r{i}, %r{i}, %r{i}; " for i in (10, 11, 12))
    return f"{rounded}{line} mov.b32 {{%h1, %h2}}, %r13; cvt.f32.{name} %r13, %h1;"


def rounded_down(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> float:
    """Return the largest float32 that is at most x * y + z."""
    if not all(map(math.isfinite, (x, y, z))):
        return float(x * y + z)
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    found = torch.tensor(float(exact), dtype=torch.float32)
    while Fraction(float(found)) > exact:
        found = found.nextafter(torch.tensor(-math.inf))
    return float(found)


FLOATS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add.f32 %r13, %r10, %r11;": lambda x, y, z: x + y,
    "sub.rn.f32 %r13, %r10, %r11;": lambda x, y, z: x - y,
    "mul.f32 %r13, %r10, 0f3F000000;": lambda x, y, z: x * 0.5,
    "fma.rn.f32 %r13, %r10, %r11, %r12;": lambda x, y, z: (x.double() * y + z).float(),
    "div.full.f32 %r13, %r10, %r11;": lambda x, y, z: x / y,
    "max.f32 %r13, %r10, %r11;": lambda x, y, z: x.fmax(y),
    "min.NaN.f32 %r13, %r10, %r11;": lambda x, y, z: x.minimum(y),
    "fma.rm.f32 %r13, %r10, %r11, %r12;": lambda x, y, z: torch.tensor([*map(rounded_down, x, y, z)]),
    "copysign.f32 %r13, %r10, %r11;": lambda x, y, z: y.copysign(x),
    "cvt.sat.f32.f32 %r13, %r10;": lambda x, y, z: x.nan_to_num(0).clamp(0, 1),
    "cvt.rn.bf16.f32 %h1, %r10; add.rn.f32.bf16 %r13, %h1, %r11;": lambda x, y, z: x.bfloat16().float() + y,
    "cvt.rn.f16.f32 %h1, %r10; sub.rn.f32.f16 %r13, %h1, %r11;": lambda x, y, z: x.half().float() - y,
    "cvt.rn.bf16.f32 %h1, %r10; cvt.rn.bf16.f32 %h2, %r11; fma.rn.f32.bf16 %r13, %h1, %h2, %r12;": lambda x, y, z: (
        x.bfloat16().double() * y.bfloat16().double() + z
    ).float(),
    "neg.f32 %r13, %r10;": lambda x, y, z: -x,
    "abs.ftz.f32 %r13, %r10;": lambda x, y, z: torch.where(x.abs() < 2**-126, 0.0, x.abs()),
    "ex2.approx.f32 %r13, %r10;": lambda x, y, z: x.double().exp2().float(),
    "rsqrt.approx.ftz.f32 %r13, %r10;": lambda x, y, z: torch.where(x.abs() < 2**-126, 0.0, x).double().rsqrt().float(),
    "setp.gtu.f32 %p1, %r10, %r11; selp.b32 %r13, %r11, %r12, %p1;": lambda x, y, z: torch.where(~(x <= y), y, z),
    "setp.ne.f32 %p1, %r10, %r11; selp.b32 %r13, %r11, %r12, %p1;": lambda x, y, z: torch.where(
        (x != y) & ~x.isnan() & ~y.isnan(), y, z
    ),
    "cvt.rzi.s32.f32 %r13, %r10; cvt.rn.f32.s32 %r13, %r13;": lambda x, y, z: (
        x.nan_to_num(0).double().trunc().clamp(-(2**31), 2**31 - 1).float()
    ),
    "cvt.rni.f32.f32 %r13, %r10;": lambda x, y, z: x.round(),
    "cvt.rn.bf16.f32 %h1, %r10; cvt.f32.bf16 %r13, %h1;": lambda x, y, z: x.bfloat16().float(),
    packed("bf16", "fma.rn.bf16x2 %r13, %r10, %r11, %r12;"): half(
        lambda x, y, z: (x.double() * y + z).float(), torch.bfloat16
    ),
    packed("f16", "add.f16x2 %r13, %r10, %r11;"): half(lambda x, y, z: x + y, torch.float16),
}


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text: str) -> None:
    torch.manual_seed(0)
    given = torch.randn(3, 64) * 10
    given[0, :4], given[1, 2:6] = float("nan"), given[0, 2:6]
    given[0, 6:9] = torch.tensor([float("inf"), 1e-40, 3e9])
    result = torch.zeros(64)
    loads = "".join(f"ld.global.b32 %r1{i}, [%d2+{256 * i}];" for i in range(3))
    run(f"{loads} {text} st.global.b32 [%d3], %r13; ret;", given, result)
    assert torch.equal(result.nan_to_num(77), FLOATS[text](*given).nan_to_num(77))


# ---- what the lanes of a warp exchange ----

LANES = torch.arange(64) % 32
WARP = torch.arange(64) // 32 * 32
EXCHANGES = {
    "shfl.sync.bfly.b32 %r13, %r10, 5, 31, -1;": lambda x: x[WARP + (LANES ^ 5)],
    "shfl.sync.up.b32 %r13, %r10, 3, 0, -1;": lambda x: x[WARP + torch.where(LANES < 3, LANES, LANES - 3)],
    "shfl.sync.down.b32 %r13, %r10, 3, 0x1807, -1;": lambda x: x[WARP + torch.where(LANES % 8 > 4, LANES, LANES + 3)],
    "shfl.sync.idx.b32 %r13|%p1, %r10, 2, 31, -1;": lambda x: x[WARP + 2],
    "redux.sync.add.s32 %r13, %r10, -1;": lambda x: x.view(2, 32).sum(1).int().repeat_interleave(32),
    "redux.sync.min.s32 %r13, %r10, -1;": lambda x: x.view(2, 32).amin(1).repeat_interleave(32),
    "redux.sync.max.u32 %r13, %r10, -1;": lambda x: (x.view(2, 32).long() % 2**32).amax(1).int().repeat_interleave(32),
    "setp.gt.s32 %p1, %r10, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r13, 1, 0, %p2;": lambda x: (
        (x.view(2, 32) > 0).any(1).int().repeat_interleave(32)
    ),
    "and.b32 %r11, %r10, 1; setp.ne.b32 %p1, %r11, 0; vote.sync.ballot.b32 %r13, %p1, -1;": lambda x: (
        ((x.view(2, 32) % 2) << torch.arange(32)).sum(1).int().repeat_interleave(32)
    ),
    "and.b32 %r11, %r10, 3; match.any.sync.b32 %r13, %r11, -1;": lambda x: (
        ((x.view(2, 32, 1) % 4 == x.view(2, 1, 32) % 4).long() << torch.arange(32)).sum(2).int().view(64)
    ),
}


@pytest.mark.parametrize("text", EXCHANGES)
def test_lanes_exchange(text: str) -> None:
    torch.manual_seed(0)
    given, result = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(f"ld.global.b32 %r10, [%d2]; {text} st.global.b32 [%d3], %r13; ret;", given, result)
    assert torch.equal(result, EXCHANGES[text](given))


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremum_of_a_warp(name: str) -> None:
    """Lanes without a number are left out, unless the instruction has .NaN."""
    torch.manual_seed(0)
    given, result = torch.randn(64), torch.zeros(64)
    given[3], given[40] = -math.inf, math.nan
    lowest = name == "min"
    for flag, second in (("", given[32:].nan_to_num(math.inf if lowest else -math.inf)), (".NaN", given[32:])):
        want = [(half.amin() if lowest else half.amax()).expand(32) for half in (given[:32], second)]
        text = f"redux.sync.{name}{flag}.f32 %r13, %r10, -1;"
        run(f"ld.global.b32 %r10, [%d2]; {text} st.global.b32 [%d3], %r13; ret;", given, result)
        assert torch.equal(result.nan_to_num(77), torch.cat(want).nan_to_num(77))
    with pytest.raises(PtxError, match="not known here"):
        run("redux.sync.add.f32 %r13, %r10, -1; ret;", given, result)
