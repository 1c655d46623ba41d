"""Small kernels for the tests of the machine: a body of instructions between two tensors."""

from __future__ import annotations

import struct

import torch

from tests.ptx import backend
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse

REGISTERS = ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .b64 %d<20>;\n"
# %d0, %d1: addresses of the two tensors; %r0: number of the thread; %d2, %d3: its 4-byte element in each.
BEGIN = """
ld.param.b64 %d0, [a]; ld.param.b64 %d1, [b]; mov.u32 %r0, %tid.x;
mul.wide.u32 %d4, %r0, 4; add.s64 %d2, %d0, %d4; add.s64 %d3, %d1, %d4;
mov.u32 %r1, memory; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; xor.b32 %r4, %r2, 128; add.s32 %r5, %r1, %r4;
"""  # %r3: the thread's 4 bytes of shared memory; %r5: those of a thread of the other warp


def module(body: str, threads: int = 64, version: str = "8.0", target: str = "sm_90") -> str:
    head = f".version {version}\n.target {target}\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
    head += '.global .align 1 .b8 text[5] = {119, 114, 111, 110, 103};\n.file 1 "kernel.py"\n'
    return (
        f"{head}.visible .entry kernel(.param .u64 a, .param .u64 b)\n.reqntid {threads}\n{{\n{REGISTERS}{body}\n}}\n"
    )


def run(
    body: str, a: torch.Tensor, b: torch.Tensor, threads: int = 64, blocks: int = 1, ordered: bool = False, **facts: str
) -> Machine:
    machine, memory = Machine(parse(module(BEGIN + body, threads, **facts), "kernel")), GlobalMemory(ordered)
    for tensor in (a, b):
        backend.allow(memory, tensor)
    machine.most_steps = 10_000
    machine.launch(memory, (blocks, 1, 1), (threads, 1, 1), struct.pack("<QQ", a.data_ptr(), b.data_ptr()), 1024)
    return machine
