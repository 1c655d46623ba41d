"""The order of threads, and every fault of a kernel, beside the same kernel without the fault."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from tests.ptx.access import DeviceAssertionError
from tests.ptx.machine import Machine
from tests.ptx.memory import READ, GlobalMemory
from tests.ptx.parse import PtxError, parse
from tests.ptx.small import module, run

# ---- order ----


def test_threads_that_part_meet_again() -> None:
    """Several blocks run a loop of (thread number modulo 5) rounds and a two-sided branch."""
    body = """
    rem.u32 %r10, %r0, 5; mov.u32 %r11, 0; mov.u32 %r12, %ctaid.x;
    LOOP: setp.ge.u32 %p1, %r11, %r10; @%p1 bra DONE;
    add.s32 %r11, %r11, 1; bra LOOP;
    DONE: setp.eq.u32 %p2, %r11, 3; @!%p2 bra OTHER;
    mov.u32 %r11, 100; bra JOIN;
    OTHER: add.s32 %r11, %r11, 50;
    JOIN: redux.sync.add.s32 %r13, %r11, -1; mul.wide.u32 %d5, %r12, 256; add.s64 %d3, %d3, %d5;
    st.global.b32 [%d3], %r13; ret;"""
    result = torch.zeros(200, 64, dtype=torch.int32)
    machine = run(body, torch.zeros(1), result, blocks=200)
    each = [100 if n % 5 == 3 else n % 5 + 50 for n in range(64)]
    want = torch.tensor([sum(each[:32])] * 32 + [sum(each[32:])] * 32, dtype=torch.int32)
    assert (result == want).all()
    assert machine.ran.sum() > 200 * 64 * 10
    assert (machine.ran > 0).all()


def test_lanes_wait_for_their_warp() -> None:
    """Odd lanes take a longer way back to the loop's begin, which lies before the place of the way."""
    body = """
    and.b32 %r10, %r0, 1; setp.ne.s32 %p1, %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; bra BEGIN;
    WAY: add.s32 %r12, %r12, 100;
    BEGIN: redux.sync.add.s32 %r13, %r12, -1; add.s32 %r11, %r11, 1; setp.eq.s32 %p2, %r11, 3; @%p2 bra END;
    @!%p1 bra BEGIN; bra WAY;
    END: st.global.b32 [%d3], %r13; ret;"""
    result = torch.zeros(64, dtype=torch.int32)
    run(body, torch.zeros(1), result)
    assert (result == 2 * 100 * 16).all()


def test_halves_of_a_warp_go_different_ways() -> None:
    body = """
    and.b32 %r10, %r0, 16; setp.ne.s32 %p1, %r10, 0; @%p1 bra UPPER;
    redux.sync.add.s32 %r13, %r0, 0xFFFF; bra END;
    UPPER: redux.sync.max.s32 %r13, %r0, 0xFFFF0000;
    END: st.global.b32 [%d3], %r13; ret;"""
    result = torch.zeros(64, dtype=torch.int32)
    run(body, torch.zeros(1), result)
    sums = [sum(range(32 * warp, 32 * warp + 16)) for warp in (0, 1)]
    assert result.tolist() == [sums[0]] * 16 + [31] * 16 + [sums[1]] * 16 + [63] * 16


def test_a_last_warp_has_fewer_threads() -> None:
    body = f"""
    st.shared.b32 [%r3], %r0; {BARRIER} setp.lt.u32 %p1, %r0, 8; @!%p1 bra END;
    ld.shared.b32 %r10, [%r3+128]; st.global.b32 [%d3], %r10; END: ret;"""
    result = torch.zeros(40, dtype=torch.int32)
    run(body, torch.zeros(1), result, threads=40)
    assert result.tolist() == [*range(32, 40), *[0] * 32]
    with pytest.raises(PtxError, match="a lane that is named as a member does not take part"):
        run("redux.sync.add.s32 %r13, %r0, -1; ret;", torch.zeros(1), result, threads=40)


def test_local_memory_is_of_each_thread() -> None:
    body = """
    .local .align 8 .b8 own[16];
    mov.u64 %d10, own; cvta.local.u64 %d11, %d10; st.local.b32 [%d10+4], %r0; ld.b32 %r10, [%d11+OFFSET];
    st.global.b32 [%d3], %r10; ret;"""
    result = torch.zeros(64, dtype=torch.int32)
    run(body.replace("OFFSET", "4"), torch.zeros(1), result)
    assert result.tolist() == [*range(64)]
    with pytest.raises(PtxError, match="4 bytes of local memory where a thread has none"):
        run(body.replace("OFFSET", "16"), torch.zeros(1), result)


def test_blocks_are_not_larger_than_a_kernel_allows() -> None:
    memory, text = GlobalMemory(), module("ret;").replace(".reqntid 64", ".maxntid 8, 4, 1")
    machine = Machine(parse(text, "kernel"))
    machine.launch(memory, (1, 1, 1), (32, 1, 1), bytes(16))
    with pytest.raises(PtxError, match="kernel allows blocks of 32 threads, got"):
        machine.launch(memory, (1, 1, 1), (33, 1, 1), bytes(16))


# ---- faults: name -> (faulty body, message, correct body) ----

STORE, LOAD, OTHER = "st.shared.b32 [%r3], %r0;", "ld.shared.b32 %r10, [%r3];", "ld.shared.b32 %r10, [%r5];"
BARRIER, END = "bar.sync 0;", "st.global.b32 [%d3], %r0; ret;"
COPY, COMMIT, WAIT = "cp.async.ca.shared.global [%r3], [%d2], 4;", "cp.async.commit_group;", "cp.async.wait_group 0;"
DESCRIPTOR = f"shr.u32 %r10, %r1, 4; cvt.u64.u32 %d10, %r10; or.b64 %d10, %d10, {8 << 32 | 8 << 16};"
WGMMA = (
    DESCRIPTOR + "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r11, %r12, %r13, %r14}, {%r0, %r0, %r0, %r0}, "
    "%d10, 0, 1, 1, 0;"
)
ISSUED, WAITED = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"

FAULTS = {
    "behind a tensor": (
        "ld.global.b32 %r10, [%d2+4];",
        "a load of 4 bytes outside all tensors",
        "ld.global.b32 %r10, [%d2];",
    ),
    "before a tensor": (
        "st.global.b32 [%d3+-4], %r0;",
        "a store of 4 bytes outside all tensors",
        "st.global.b32 [%d3], %r0;",
    ),
    "misaligned": (
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d1+8];",
        "a misaligned access of 16 bytes",
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d1+16];",
    ),
    "unwritten": (f"{LOAD}", "a load of what nobody has written", f"{STORE} {LOAD}"),
    "beyond shared memory": (
        "st.shared.b32 [%r3+800], %r0;",
        "4 bytes of shared memory at 1024, of which a block has 1024",
        "st.shared.b32 [%r3+768], %r0;",
    ),
    "read before the barrier": (
        f"{STORE} {OTHER}",
        "a race: a load of what another warp stores",
        f"{STORE} {BARRIER} {OTHER}",
    ),
    "written before the barrier": (
        f"{STORE} {BARRIER} {OTHER} {STORE}",
        "a race: a store to what another warp loads",
        f"{STORE} {BARRIER} {OTHER} {BARRIER} {STORE}",
    ),
    "written by two": (
        f"{STORE} st.shared.b32 [%r5], %r0;",
        "a race: two warps store",
        f"{STORE} {BARRIER} st.shared.b32 [%r5], %r0;",
    ),
    "written by two at once": (
        "st.shared.b32 [%r1], %r0;",
        "a race: two warps store at once",
        "st.shared.b32 [%r1], 5;",
    ),
    "atomic beside a store": (
        f"{STORE} red.shared.add.u32 [%r1], 1;",
        "a race: an atomic",
        f"{STORE} {BARRIER} red.shared.add.u32 [%r1], 1;",
    ),
    "copy without a wait": (
        f"{COPY} {COMMIT}",
        "an asynchronous copy that nobody has waited for",
        f"{COPY} {COMMIT} {WAIT}",
    ),
    "copy without a commit": (
        f"{COPY} {WAIT}",
        "an asynchronous copy that nobody has waited for",
        f"{COPY} {COMMIT} {WAIT}",
    ),
    "copy read too early": (
        f"{COPY} {COMMIT} {LOAD} {WAIT}",
        "a load of what an asynchronous copy has not delivered",
        f"{COPY} {COMMIT} {WAIT} {LOAD}",
    ),
    "copy waited for in part": (
        f"{COPY} {COMMIT} cp.async.wait_group 1; {LOAD} {WAIT}",
        "a load of what an asynchronous copy has not delivered",
        f"{COPY} {COMMIT} {COMMIT} cp.async.wait_group 1; {LOAD} {WAIT}",
    ),
    "copy read by another warp": (
        f"{COPY} {COMMIT} {WAIT} {OTHER}",
        "a race: a load of what another warp stores",
        f"{COPY} {COMMIT} {WAIT} {BARRIER} {OTHER}",
    ),
    "copy over what is read": (
        f"{STORE} {BARRIER} {OTHER} {COPY} {COMMIT} {WAIT}",
        "a race: a store to what another warp loads",
        f"{STORE} {BARRIER} {OTHER} {BARRIER} {COPY} {COMMIT} {WAIT}",
    ),
    "store under a copy": (
        f"{COPY} {STORE} {COMMIT} {WAIT}",
        "a store to what an asynchronous copy",
        f"{COPY} {COMMIT} {WAIT}",
    ),
    "barrier of some": (
        f"setp.lt.u32 %p1, %r0, 32; @%p1 bra END; {BARRIER} END:",
        "a barrier that some threads of a block never reach",
        f"setp.lt.u32 %p1, %r0, 99; @!%p1 bra END; {BARRIER} END:",
    ),
    "lanes missing": (
        "setp.lt.u32 %p1, %r0, 40; @%p1 shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;",
        "a lane that is named as a member does not take part",
        "setp.lt.u32 %p1, %r0, 32; @%p1 shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;",
    ),
    "lane read that is not there": (
        "and.b32 %r9, %r0, 31; setp.lt.u32 %p1, %r9, 8; @%p1 shfl.sync.bfly.b32 %r10, %r0, 8, 31, 255;",
        "a shuffle reads a lane that does not take part",
        "and.b32 %r9, %r0, 31; setp.lt.u32 %p1, %r9, 8; @%p1 shfl.sync.bfly.b32 %r10, %r0, 4, 31, 255;",
    ),
    "stale cache": (
        "ld.global.nc.b32 %r10, [%d3]; st.global.b32 [%d3], %r10;",
        r"a load through the non-coherent cache \(.nc\) of bytes that the same launch stores",
        "ld.global.nc.b32 %r10, [%d2]; st.global.b32 [%d3], %r10;",
    ),
    "no end": ("LOOP: bra LOOP;", "a loop that does not end", "bra END; END:"),
    "instruction": ("sin.approx.f32 %r10, %r0;", "an instruction that is not known here", "ex2.approx.f32 %r10, %r0;"),
    "modifier": (
        "add.rz.f32 %r10, %r0, %r0;",
        "an instruction that is not known here: .rz",
        "add.rn.f32 %r10, %r0, %r0;",
    ),
    "never run": ("bra END; sin.approx.f32 %r10, %r0; END:", "not known here", "bra END; END:"),
    "operand": ("add.s32 %r10, %r0, nothing;", "an operand that is not known here: nothing", "add.s32 %r10, %r0, 1;"),
    "special register": ("mov.u32 %r10, %smid;", "a special register that is not known here", "mov.u32 %r10, %laneid;"),
    "wide register": ("add.s64 %d10, %r0, %d1;", "%r0 is .b32, not .s64", "add.s64 %d10, %d0, %d1;"),
}
WIDE_FAULTS = {  # with the threads of a warpgroup
    "wgmma without a wait": (
        f"{STORE} {BARRIER} {WGMMA} {ISSUED}",
        "a wgmma that nobody has waited for",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED}",
    ),
    "wgmma without a commit": (
        f"{STORE} {BARRIER} {WGMMA} {WAITED}",
        "a wgmma that nobody has waited for",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED}",
    ),
    "wgmma before the barrier": (
        f"{STORE} {WGMMA} {ISSUED} {WAITED}",
        "a race: a wgmma reads what is stored since the last barrier",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED}",
    ),
    "copy before the wait": (
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {COPY} {COMMIT} {WAITED} {WAIT}",
        "a race: a wgmma reads what an asynchronous copy writes",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED} {BARRIER} {COPY} {COMMIT} {WAIT}",
    ),
    "unwritten tile": (
        f"{WGMMA} {ISSUED} {WAITED}",
        "a wgmma reads what nobody has written",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED}",
    ),
    "store before the wait": (
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {STORE} {WAITED}",
        "a race: a wgmma reads what is stored since the last barrier",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED} {BARRIER} {STORE}",
    ),
    "descriptors that differ": (
        f"{STORE} {BARRIER} {WGMMA.replace('cvt.u64.u32 %d10, %r10', 'cvt.u64.u32 %d10, %r0')} {ISSUED} {WAITED}",
        "the matrix descriptors of a warpgroup differ",
        f"{STORE} {BARRIER} {WGMMA} {ISSUED} {WAITED}",
    ),
}
EVERY_FAULT = {**dict.fromkeys(FAULTS, 64), **dict.fromkeys(WIDE_FAULTS, 128)}


@pytest.mark.parametrize(("name", "threads"), EVERY_FAULT.items(), ids=[name.replace(" ", "-") for name in EVERY_FAULT])
def test_faults_are_said(name: str, threads: int) -> None:
    """The error has the kernel's name and the instruction's text; the kernel without the fault runs."""
    wrong, message, right = {**FAULTS, **WIDE_FAULTS}[name]
    a, b = torch.zeros(threads, dtype=torch.int32), torch.zeros(threads, dtype=torch.int32)
    run(right + END, a, b, threads)
    assert torch.equal(b, torch.arange(threads, dtype=torch.int32)) or "st.global" in right
    with pytest.raises(PtxError, match=f"(?s){message}.*in kernel, instruction"):
        run(wrong + END, a, b, threads)


OTHERS = "cvt.u64.u32 %d5, %r4; add.s64 %d5, %d1, %d5;"  # the element of a thread of the other warp
MINE_STORED, OTHERS_LOADED = "st.global.b32 [%d3], %r0;", "ld.global.b32 %r10, [%d5];"
RACES = {  # name -> (faulty body, message, correct body)
    "load after a store": (
        f"{OTHERS} {MINE_STORED} {OTHERS_LOADED}",
        "a load of what another warp stores",
        f"{OTHERS} {MINE_STORED} {BARRIER} {OTHERS_LOADED}",
    ),
    "store after a load": (
        f"{OTHERS} {OTHERS_LOADED} {MINE_STORED}",
        "a store to what another warp loads",
        f"{OTHERS} {OTHERS_LOADED} {BARRIER} {MINE_STORED}",
    ),
    "store after a load by all": (
        f"ld.global.b32 %r10, [%d1]; {MINE_STORED}",
        "a store to what another warp loads, 0 bytes",
        f"ld.global.b32 %r10, [%d1]; {BARRIER} ld.global.b32 %r10, [%d1]; {BARRIER} {MINE_STORED}",
    ),
    "two stores": (
        f"{OTHERS} {MINE_STORED} st.global.b32 [%d5], %r0;",
        "two warps store",
        f"{OTHERS} {MINE_STORED} {BARRIER} st.global.b32 [%d5], %r0;",
    ),
    "two stores at once": (
        "st.global.b32 [%d1], 5;",
        "two warps store at once",
        "setp.lt.u32 %p1, %r0, 32; @%p1 st.global.b32 [%d1], 5;",
    ),
    "two blocks": (
        f"mov.u32 %r11, %ctaid.y; setp.eq.u32 %p1, %r11, 0; @%p1 {MINE_STORED}",
        "two warps store",
        f"mov.u32 %r11, %ctaid.x; setp.eq.u32 %p1, %r11, 0; @%p1 {MINE_STORED}",
    ),
}


@pytest.mark.parametrize("name", RACES, ids=[name.replace(" ", "-") for name in RACES])
def test_races_in_global_memory(name: str) -> None:
    wrong, message, right = RACES[name]
    a, b, blocks = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), 2 if "blocks" in name else 1
    run(f"{right} ret;", a, b, blocks=blocks, ordered=True)
    run(f"{wrong} ret;", a, b, blocks=blocks)
    with pytest.raises(PtxError, match=f"a race: {message}"):
        run(f"{wrong} ret;", a, b, blocks=blocks, ordered=True)


def test_inputs_are_only_read() -> None:
    given, memory = torch.zeros(64), GlobalMemory()
    memory.allow(given.data_ptr(), np.full(256, READ, np.uint8))
    machine = Machine(parse(module("ld.param.b64 %d0, [a]; st.global.b32 [%d0+8], 0; ret;"), "kernel"))
    with pytest.raises(PtxError, match="a store of 4 bytes to a tensor that may only be read, 8 bytes behind"):
        machine.launch(memory, (1, 1, 1), (64, 1, 1), struct.pack("<QQ", given.data_ptr(), 0))


def test_bytes_between_elements_are_nobodys() -> None:
    every_other = torch.zeros(128, dtype=torch.int32)[::2]
    run("add.s64 %d2, %d2, %d4; ld.global.b32 %r10, [%d2]; ret;", every_other, every_other)
    with pytest.raises(PtxError, match="between the elements of a tensor, 4 bytes behind its begin"):
        run("ld.global.b32 %r10, [%d2]; ret;", every_other, every_other)


def test_a_tensor_may_begin_anywhere() -> None:
    """The tensor begins one byte behind an aligned address; aligned accesses in it find its elements."""
    memory, result = torch.arange(8 * 64, dtype=torch.int32).view(torch.uint8), torch.zeros(64, dtype=torch.int32)
    body = "add.s64 %d5, %d0, 15; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5+16]; st.global.b32 [%d3], %r13; ret;"
    run(body, memory[1:], result)
    assert (result == 11).all()
    with pytest.raises(PtxError, match="a misaligned access of 16 bytes"):
        run(body.replace("%d0, 15", "%d0, 16"), memory[1:], result)
    with pytest.raises(PtxError, match="a load of 4 bytes"):
        run(f"add.s64 %d5, %d0, -1; ld.global.b32 %r10, [%d5]; {END}", memory[1:], result)


def test_assertions_are_read() -> None:
    call = "mov.u64 %d9, text; st.param.b64 [param0], %d9; st.param.b64 [param1], %d9; call.uni __assertfail, (param0);"
    with pytest.raises(DeviceAssertionError, match="device-side assertion: wrong in wrong"):
        run(call, torch.zeros(64), torch.zeros(64))


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"version": "10.0"}, "PTX 10.0 is not known"), ({"target": "sm_120a"}, "the target sm_120a")],
)
def test_other_versions_and_targets_are_refused(facts: dict[str, str], message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(END, torch.zeros(64), torch.zeros(64), **facts)


def test_the_line_of_the_source_is_said() -> None:
    with pytest.raises(PtxError, match=r"ld.shared.b32 %r10, \[%r3\]  \(kernel.py:12\)"):
        run(f"\n.loc 1 12 5\n{LOAD}\nret;", torch.zeros(64), torch.zeros(64))
