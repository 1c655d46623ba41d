"""Compute from a kernel's machine code how many bytes it has in flight; with too few it cannot saturate the memory.

The bytes that a multiprocessor needs in flight for its full bandwidth are CUB's `arch_to_min_bytes_in_flight`. Those of
one thread are read off the code in program order, which is a lower bound where the code branches: a load ends where its
register is used, an asynchronous copy where it is waited for. The number of resident threads follows from registers and
shared memory.
"""

from __future__ import annotations

import re
from collections import deque

from vlmfast.benchmarks.predicted import GPUS

H200 = GPUS["H200"]
# Limits of a multiprocessor of compute capability 8.0, 9.0 and 10.0; SHARED_OF_SYSTEM bytes are reserved per block.
REGISTERS, WARPS, BLOCKS, SHARED_OF_SYSTEM = 65536, 64, 32, 1 << 10

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")


def width(opcode: str) -> int:
    """Return the bytes that a thread loads or stores by one machine instruction."""
    bits = [int(number) for number in re.findall(r"\.[USF]?(256|128|64|16|8)\b", opcode)]
    return max(bits, default=32) // 8


def outstanding(code: str) -> int:
    """Return the most bytes of global memory that a thread has in flight at any instruction."""
    most = 0
    loads: list[tuple[set[int], int]] = []  # (registers that it fills, bytes)
    copies: deque[int] = deque([0])  # bytes of each group of asynchronous copies; the last group is still open
    for opcode, operands in INSTRUCTION.findall(code):
        named = [(int(number), bool(wide)) for number, wide in REGISTER.findall(operands)]
        if opcode.startswith("LDGSTS"):
            copies[-1] += width(opcode)
        elif opcode.startswith("LDGDEPBAR"):
            copies.append(0)
        elif opcode.startswith("DEPBAR") and (left := re.search(r"0x([0-9a-f]+)", operands)):
            while len(copies) > 1 + int(left[1], 16):
                copies.popleft()
        size = width(opcode)
        used = {number + i for number, wide in named for i in range(1 + wide)}
        target: set[int] = set()
        if re.match(r"LDG(\.|$)", opcode):
            first = named[0][0]
            target = set(range(first, first + max(1, size // 4)))
            used |= target
        elif re.match(r"ST[GS]\b", opcode) and named:  # the stored register is the last operand
            used |= set(range(named[-1][0], named[-1][0] + max(1, size // 4)))
        loads = [load for load in loads if not load[0] & used]
        if target:
            loads.append((target, size))
        most = max(most, sum(size for _, size in loads) + sum(copies))
    return most


def resident(registers: int, warps: int, shared: int, of_multiprocessor: int = H200.shared) -> int:
    """Return how many blocks are resident on a multiprocessor, which has so many bytes of shared memory."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    return min(by_registers, WARPS // warps, BLOCKS, of_multiprocessor // (shared + SHARED_OF_SYSTEM))
