"""Tiles of matrices: loads and stores in the layout of tensor cores, and their multiplications.

Products are summed in float64 and rounded once to float32. A GPU rounds more often, in an unspecified order.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.instructions import Action, instruction, unknown
from tests.ptx.parse import Instruction, PtxError, names_of
from tests.ptx.registers import number
from tests.ptx.values import TYPES, Type
from tests.ptx.warps import LANE, by_warp, whole_warps

GROUP, PLACE = LANE // 4, LANE % 4  # four lanes hold a row of a tile
WARPGROUP = 128
U32 = TYPES["u32"]


def _halves(bits: np.ndarray, kind: Type) -> np.ndarray:
    """Unpack the two numbers of each 32-bit register, along a new last dimension."""
    packed = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
    return packed if kind.kind == "b" else kind.unpack(packed)


# ---- ldmatrix, stmatrix: 8x8 tiles of 16-bit elements, whose rows lie where lanes say ----


def _rows(machine, address, count: int, warps: np.ndarray, load: bool) -> np.ndarray:
    """Return the checked addresses of the tiles' rows: (participating warps, count * 8)."""
    lanes = np.flatnonzero(np.repeat(warps, 32) & (np.tile(LANE, len(warps)) < 8 * count))
    offsets = machine.shared_offsets(machine.of(address, lanes), lanes, 16, 16)
    note = machine.shared.note_load if load else machine.shared.note_store
    note(offsets, 16, machine.block_of[lanes], machine.warp_of[lanes])
    return offsets.reshape(-1, 8 * count) // 2


def _index(transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column in a tile of the two elements of each lane: (32, 2) each."""
    row, column = np.stack([GROUP, GROUP], 1), np.stack([2 * PLACE, 2 * PLACE + 1], 1)
    return (column, row) if transposed else (row, column)


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def load_matrix(machine, ins: Instruction) -> Action:
    writes = [machine.target(name) for name in names_of(ins.args[0])]
    address, (row, column) = machine.address(ins.args[1]), _index("trans" in ins.flags)

    def run() -> None:
        warps = whole_warps(machine)
        rows = _rows(machine, address, len(writes), warps, load=True)
        for tile, write in enumerate(writes):
            elements = machine.shared.content[2][rows[:, 8 * tile + row] + column]
            found = np.zeros((len(warps), 32), np.uint32)
            found[warps] = np.ascontiguousarray(elements).view(np.uint32)[..., 0]
            write(found.reshape(-1))

    return run


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def store_matrix(machine, ins: Instruction) -> Action:
    sources = [machine.source(name, U32) for name in names_of(ins.args[1])]
    address, (row, column) = machine.address(ins.args[0]), _index("trans" in ins.flags)

    def run() -> None:
        warps = whole_warps(machine)
        rows = _rows(machine, address, len(sources), warps, load=False)
        for tile, read in enumerate(sources):
            elements = _halves(by_warp(machine, read)[warps], TYPES["b16"])
            machine.shared.content[2][rows[:, 8 * tile + row] + column] = elements

    return run


# ---- mma.sync: one warp multiplies ----


@instruction("mma", "sync aligned m16n8k16 m16n8k8 row col")
def multiply(machine, ins: Instruction) -> Action:
    """Compute D = A B + C with A (16, k) and B (k, 8) in half precision, and C and D (16, 8) in float32."""
    depth = 16 if "m16n8k16" in ins.flags else 8
    _, kind, other, _ = ins.types
    accumulators = {t.name for t in (ins.types[0], ins.types[3])}
    if ins.flags[-2:] != ("row", "col") or accumulators != {"f32"} or kind != other or kind.name not in ("f16", "bf16"):
        raise unknown(ins)
    writes = [machine.target(name) for name in names_of(ins.args[0])]
    a, b, c = ([machine.source(name, U32) for name in names_of(arg)] for arg in ins.args[1:])

    def run() -> None:
        whole_warps(machine)
        count = machine.threads // 32
        left, right = np.zeros((count, 16, depth)), np.zeros((count, depth, 8))
        total = np.zeros((count, 16, 8))
        for index, read in enumerate(a):
            row, k = GROUP + 8 * (index % 2), 2 * PLACE + 8 * (index // 2)
            pair = _halves(by_warp(machine, read), kind)
            left[:, row, k], left[:, row, k + 1] = pair[..., 0], pair[..., 1]
        for index, read in enumerate(b):
            k = 2 * PLACE + 8 * index
            pair = _halves(by_warp(machine, read), kind)
            right[:, k, GROUP], right[:, k + 1, GROUP] = pair[..., 0], pair[..., 1]
        for index, read in enumerate(c):
            total[:, GROUP + 8 * (index // 2), 2 * PLACE + index % 2] = by_warp(machine, read).view(np.float32)
        result = (left @ right + total).astype(np.float32).view(np.uint32)
        for index, write in enumerate(writes):
            write(result[:, GROUP + 8 * (index // 2), 2 * PLACE + index % 2].reshape(-1))

    return run


# ---- wgmma: four warps multiply asynchronously, with operands in shared memory ----

# Swizzle mode of a descriptor -> (bytes of an atom's row, mask).
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def tile_addresses(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """Return the (rows, 16) addresses of the elements that a matrix descriptor describes.

    Args:
        descriptor: 64 bits, as in the PTX manual's section on wgmma.
        rows: the size of the dimension that is not summed over.
        transposed: whether the elements along that dimension are adjacent in memory.
    """
    begin, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    if (descriptor >> 49) & 7:
        raise PtxError("a matrix descriptor with a base offset is not known here")
    width, mask = _SWIZZLES[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if width == 16:
        inner = (k % 8, row % 8) if transposed else (row % 8, k % 8)
        return begin + row // 8 * stride + k // 8 * leading + inner[0] * 16 + inner[1] * 2
    if transposed:
        per = width // 2
        found = begin + row // per * leading + k // 8 * stride + k % 8 * width + row % per * 2
    else:
        found = begin + row // 8 * stride + row % 8 * width + k * 2
    return found ^ (((found >> 7) & mask) << 4)


_SHAPES = " ".join(f"m64n{n}k16" for n in range(8, 257, 8))


@instruction("wgmma", f"fence commit_group wait_group mma_async sync aligned {_SHAPES}")
def multiply_warpgroup(machine, ins: Instruction) -> Action:
    """Execute wgmma: D = A B + D with A (64, 16) in registers or shared memory, and B (16, n) in shared memory."""
    if "fence" in ins.flags:
        return lambda: None
    if "commit_group" in ins.flags:
        return lambda: machine.multiplications.commit(machine.lanes())
    if "wait_group" in ins.flags:
        left = number(ins.args[0])
        return lambda: machine.multiplications.wait(machine.lanes(), left)
    (accumulator, kind, other), (result, a, b, keep, *signs) = ins.types, ins.args
    if accumulator.name != "f32" or kind != other or kind.name not in ("f16", "bf16"):
        raise unknown(ins)
    columns = int(re.fullmatch(r"m64n(\d+)k16", ins.flags[-1])[1])
    scales, transposed = [number(x) for x in signs[:2]], [number(x) != 0 for x in signs[2:]]
    names = names_of(result)
    writes, olds = [machine.target(name) for name in names], [machine.source(name, U32) for name in names]
    in_registers = a.startswith("{")
    lefts = [machine.source(name, U32) for name in names_of(a)] if in_registers else [machine.source(a, TYPES["u64"])]
    right, kept = machine.source(b, TYPES["u64"]), machine.source(keep, TYPES["pred"])
    warp = np.repeat(np.arange(4), 32) * 16
    group, place = np.tile(GROUP, 4), np.tile(PLACE, 4)

    def registers_of_a(first: int) -> np.ndarray:
        tile = np.zeros((64, 16), np.float32)
        for index, read in enumerate(lefts):
            pair = _halves(machine.whole(read())[first : first + WARPGROUP], kind)
            row, k = warp + group + 8 * (index % 2), 2 * place + 8 * (index // 2)
            tile[row, k], tile[row, k + 1] = pair[:, 0], pair[:, 1]
        return tile

    def issue() -> None:
        lanes = machine.lanes()
        first = lanes[::WARPGROUP]
        if len(lanes) % WARPGROUP or (lanes.reshape(-1, WARPGROUP) != first[:, None] + np.arange(WARPGROUP)).any():
            raise PtxError("not all threads of a warpgroup take part")
        descriptors = [machine.whole(read()) for read in ([right] if in_registers else [right, *lefts])]
        for one in descriptors:
            if (one[lanes].reshape(-1, WARPGROUP) != one[first][:, None]).any():
                raise PtxError("the matrix descriptors of a warpgroup differ")
        keeping = machine.whole(kept())

        def finish(ready: np.ndarray) -> None:
            for begin in first[ready[::WARPGROUP]]:
                if not ready[np.flatnonzero(lanes == begin)[0] :][:WARPGROUP].all():
                    raise PtxError("not all threads of a warpgroup wait")
                multiply_one(int(begin), [int(d[begin]) for d in descriptors], bool(keeping[begin]))

        machine.multiplications.issue(lanes, finish)

    def multiply_one(begin: int, descriptors: list[int], add: bool) -> None:
        tile_b = machine.read_tile(tile_addresses(descriptors[0], columns, transposed[-1]), begin)
        if in_registers:
            tile_a = registers_of_a(begin)
        else:
            tile_a = kind.unpack(machine.read_tile(tile_addresses(descriptors[1], 64, transposed[0]), begin))
        product = tile_a.astype(np.float64) @ kind.unpack(tile_b).astype(np.float64).T * scales[0] * scales[1]
        chosen = slice(begin, begin + WARPGROUP)
        before, machine.mask = machine.mask, np.zeros(machine.threads, np.bool_)
        machine.mask[chosen] = True
        for index, (write, old) in enumerate(zip(writes, olds, strict=True)):
            row, column = warp + group + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * place + index % 2
            value = product[row, column]
            if add:
                value = value + machine.whole(old())[chosen].view(np.float32)
            spread = np.zeros(machine.threads, np.float32)
            spread[chosen] = value
            write(spread.view(np.uint32))
        machine.mask = before

    return issue
