"""How many bytes a GPU has under way of a kernel at once, from its machine code: too few, and memory waits.

What a multiprocessor needs for all of its bandwidth is CUB's `arch_to_min_bytes_in_flight`. What a thread has under way
is read off the code in its order, a lower bound where it branches: a load ends where its register is used, an
asynchronous copy where it is waited for. How many threads there are at once, registers and shared memory say.
"""

from __future__ import annotations

import re
from collections import deque

NEEDED = 48 << 10  # bytes a multiprocessor, of an H200
MULTIPROCESSORS = 132  # of an H200
# of a multiprocessor of compute capability 9.0
REGISTERS, WARPS, BLOCKS, SHARED, SHARED_OF_SYSTEM = 65536, 64, 32, 228 << 10, 1 << 10

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")


def width(opcode: str) -> int:
    """The bytes that a thread loads or stores by one instruction of the machine code."""
    bits = [int(number) for number in re.findall(r"\.[USF]?(256|128|64|16|8)\b", opcode)]
    return max(bits, default=32) // 8


def outstanding(code: str) -> int:
    """The most bytes of global memory that a thread has asked for, and does not have yet."""
    most = 0
    loads: list[tuple[set[int], int]] = []  # (registers that it fills, bytes)
    copies: deque[int] = deque([0])  # of each group, the last one open
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
        elif re.match(r"ST[GS]\b", opcode) and named:  # what is stored comes last
            used |= set(range(named[-1][0], named[-1][0] + max(1, size // 4)))
        loads = [load for load in loads if not load[0] & used]
        if target:
            loads.append((target, size))
        most = max(most, sum(size for _, size in loads) + sum(copies))
    return most


def resident(registers: int, warps: int, shared: int) -> int:
    """How many blocks a multiprocessor runs at once."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    return min(by_registers, WARPS // warps, BLOCKS, SHARED // (shared + SHARED_OF_SYSTEM))


def in_flight(code: str, registers: int, warps: int, shared: int, programs: int) -> int:
    """The bytes that a multiprocessor of an H200 has under way, where so many programs run on all of them."""
    blocks = min(resident(registers, warps, shared), programs / MULTIPROCESSORS)
    return int(blocks * warps * 32 * outstanding(code))
