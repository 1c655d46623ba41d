"""Global, shared and local memory, and what is allowed with each byte. Arrays of addresses have one per thread."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from tests.ptx.order import Order, Who
from tests.ptx.parse import PtxError, Variable
from tests.ptx.values import UNSIGNED

READ, WRITE = 1, 2
Where = np.ndarray | slice


def host_bytes(begin: int, size: int) -> np.ndarray:
    """Return ``size`` bytes of this process's memory, as an array that shares them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))


def places(offsets: np.ndarray, size: int, count: int) -> Iterator[np.ndarray]:
    """Yield the indexes, in units of ``size`` bytes, of the ``count`` neighbours that begin at each offset."""
    first = offsets >> (size.bit_length() - 1)  # much faster than a division
    yield first
    for index in range(1, count):
        yield first + index


def neighbours(content: np.ndarray, offsets: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Read the ``count`` neighbours of ``size`` bytes at each offset."""
    return [content[place] for place in places(offsets, size, count)]


class Region:
    """A contiguous part of global memory, and what a kernel may do with each byte of it."""

    def __init__(self, begin: int, content: np.ndarray, allowed: np.ndarray) -> None:
        self.begin, self.end = begin, begin + len(content)
        self.content = {n: content[: len(content) // n * n].view(raw) for n, raw in UNSIGNED.items()}
        whole = bool((allowed == allowed[:1]).all()) and len(allowed) > 0
        self.everywhere = int(allowed[0]) if whole else 0
        # Running counts of bytes that may be read, and written: an access is allowed if the count rises by its width.
        self.counts = {} if whole else {kind: _running((allowed & kind) > 0) for kind in (READ, WRITE)}
        self.stored, self.cached = (np.zeros(len(content), np.bool_) for _ in range(2))
        self.order: Order | None = None

    def permits_all(self, kind: int, addresses: np.ndarray, width: int) -> bool:
        """Tell whether every access is allowed."""
        if addresses.min() < self.begin or addresses.max() + width > self.end:
            return False
        return bool(self.everywhere & kind) or bool(self._permits(kind, addresses - self.begin, width).all())

    def permits(self, kind: int, addresses: np.ndarray, width: int) -> np.ndarray:
        """Return which accesses are allowed."""
        inside = (addresses >= self.begin) & (addresses + width <= self.end)
        return inside & self._permits(kind, np.where(inside, addresses - self.begin, 0), width)

    def _permits(self, kind: int, offsets: np.ndarray, width: int) -> np.ndarray:
        if not self.counts:
            return np.full(len(offsets), bool(self.everywhere & kind))
        count = self.counts[kind]
        return count[np.minimum(offsets + width, len(count) - 1)] - count[offsets] == width


def _running(flags: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])


class Constant:
    """A constant of a module, in its own memory, which kernels may read."""

    def __init__(self, variable: Variable) -> None:
        align = max(variable.align, 8)
        self.room = np.zeros(variable.size + align, np.uint8)
        self.begin = -(-self.room.ctypes.data // align) * align
        self.room[self.begin - self.room.ctypes.data :][: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
        self.allowed = np.full(variable.size, READ, np.uint8)


class GlobalMemory:
    """The global memory that a launch may access: call `allow`, then `load` and `store`.

    Races are looked for if ``ordered``. Kernels of Triton may store the same numbers by several warps.
    """

    def __init__(self, ordered: bool = False) -> None:
        self.ordered = ordered
        self.spans: list[tuple[int, np.ndarray]] = []  # (begin, what is allowed with each byte from there on)
        self.regions: list[Region] = []
        self.non_coherent = False  # whether the kernel loads through the non-coherent cache; then stores are recorded

    def allow(self, begin: int, allowed: np.ndarray) -> None:
        """Allow accesses to a span: 0, `READ`, `WRITE` or both for each byte. Spans may overlap."""
        if len(allowed):
            self.spans.append((begin, allowed))
            self.regions = []

    def ready(self, unit: int = 1) -> None:
        """Join overlapping spans into regions, once all spans are known; all accesses are multiples of ``unit``."""
        groups: list[list[tuple[int, np.ndarray]]] = []
        for begin, allowed in sorted(self.spans, key=lambda span: span[0]):
            if groups and begin < max(at + len(flags) for at, flags in groups[-1]):
                groups[-1].append((begin, allowed))
            else:
                groups.append([(begin, allowed)])
        for group in groups:
            begin = group[0][0] // 16 * 16  # so that an aligned access is at a multiple of its width
            flags = np.zeros(max(at + len(one) for at, one in group) - begin, np.uint8)
            for at, one in group:
                flags[at - begin :][: len(one)] |= one
            region = Region(begin, host_bytes(begin, len(flags)), flags)
            if self.ordered and (flags & WRITE).any():
                region.order = Order(len(flags), unit)
            self.regions.append(region)

    def _parts(self, addresses: np.ndarray, width: int, kind: int) -> list[tuple[Region, Where, np.ndarray]]:
        """Split addresses into (region, accesses, offsets); there are several only if lanes chose between pointers."""
        odd = addresses & (width - 1)
        if odd.any():
            raise PtxError(f"a misaligned access of {width} bytes at {hex(int(addresses[odd != 0][0]))}")
        for region in self.regions:
            if region.permits_all(kind, addresses, width):
                return [(region, slice(None), addresses - region.begin)]
        parts, left = [], np.ones(len(addresses), np.bool_)
        for region in self.regions:
            chosen = region.permits(kind, addresses, width) & left
            if chosen.any():
                parts.append((region, np.flatnonzero(chosen), addresses[chosen] - region.begin))
                left &= ~chosen
        if left.any():
            raise PtxError(self._outside(int(addresses[left][0]), width, kind))
        return parts

    def _outside(self, address: int, width: int, kind: int) -> str:
        what = f"{'a load' if kind == READ else 'a store'} of {width} bytes"
        near = min(self.regions, key=lambda r: max(r.begin - address, address + width - r.end), default=None)
        if near is None:
            return f"{what} where a kernel has no memory at all"
        at = address - near.begin
        if kind == WRITE and near.permits_all(READ, np.array([address]), width):
            return f"{what} to a tensor that may only be read, {at} bytes behind its begin"
        if at >= 0 and address + width <= near.end:
            return f"{what} between the elements of a tensor, {at} bytes behind its begin"
        return f"{what} outside all tensors, {at} bytes behind the begin of one of {near.end - near.begin} bytes"

    def load(
        self, addresses: np.ndarray, size: int, count: int, coherent: bool = True, who: Who | None = None
    ) -> list[np.ndarray]:
        """Load ``count`` neighbours of ``size`` bytes from each address; ``who`` tells which warps do."""
        width = size * count
        parts = self._parts(addresses, width, READ)
        for region, where, offsets in parts:
            if region.order and who:
                region.order.note_load(offsets, width, [value[where] for value in who])
        if not coherent:
            for region, _, offsets in parts:
                _mark(region.cached, offsets, width)
        if len(parts) == 1:
            region, _, offsets = parts[0]
            return neighbours(region.content[size], offsets, size, count)
        columns = [np.empty(len(addresses), UNSIGNED[size]) for _ in range(count)]
        for region, where, offsets in parts:
            for column, found in zip(columns, neighbours(region.content[size], offsets, size, count), strict=True):
                column[where] = found
        return columns

    def store(self, addresses: np.ndarray, columns: Sequence[np.ndarray], who: Who | None = None) -> None:
        size = columns[0].dtype.itemsize
        for region, where, offsets in self._parts(addresses, size * len(columns), WRITE):
            if region.order and who:
                region.order.note_store(offsets, size * len(columns), [value[where] for value in who])
            if self.non_coherent:
                _mark(region.stored, offsets, size * len(columns))
            for place, column in zip(places(offsets, size, len(columns)), columns, strict=True):
                region.content[size][place] = column[where]

    def element(self, address: int, kind: np.dtype) -> tuple[np.ndarray, int]:
        """Return a number that may be read and written, as an array and the index in it."""
        size = kind.itemsize
        for permission in (READ, WRITE):
            ((region, _, offsets),) = self._parts(np.array([address]), size, permission)
        return region.content[size].view(kind), int(offsets[0]) // size

    def text(self, address: int) -> str:
        """Return a constant string, without its terminating zero."""
        region = next(region for region in self.regions if region.begin <= address < region.end)
        return bytes(region.content[1][address - region.begin :]).partition(b"\0")[0].decode()

    def finish(self) -> None:
        """Check at the end of a launch that no byte was both stored and loaded by the non-coherent cache."""
        if any((region.stored & region.cached).any() for region in self.regions):
            raise PtxError("a load through the non-coherent cache (.nc) of bytes that the same launch stores")


def _mark(flags: np.ndarray, offsets: np.ndarray, width: int) -> None:
    for byte in range(width):
        flags[offsets + byte] = True


class SharedMemory:
    """The shared memory of a batch of blocks, and which warps accessed each unit of it last.

    A unit is as wide as the narrowest access of the kernel. Between two barriers a warp must not access what another
    warp writes, and a unit must be written before it is read.

    `writes` and `reads` have a stamp per unit: the number of barriers that its block had passed, times `BARRIER`, plus
    the warp. So an access is of the current interval between barriers if its stamp is not below the interval's.
    """

    BARRIER, ATOMIC, SEVERAL = 2**16, 2**14, 2**15  # the latter two in the place of a warp
    NOBODY, IN_FLIGHT = -1, -2  # in the place of a stamp

    def __init__(self, blocks: int, size: int, unit: int) -> None:
        self.size, self.unit = size, unit
        self.stride = -(-size // 1024) * 1024 + 1024  # all blocks have the same alignment, on which swizzles depend
        content = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.content = {n: content.view(raw) for n, raw in UNSIGNED.items()}
        self.writes, self.reads = (np.full(len(content) // unit, self.NOBODY, np.int64) for _ in range(2))
        self.interval = np.zeros(blocks, np.int32)  # number of barriers that each block has passed

    def offsets(self, addresses: np.ndarray, blocks: np.ndarray, width: int, aligned: int) -> np.ndarray:
        """Return the offsets of addresses in `content`; each must lie in its block's own memory."""
        if addresses.min() < 0 or addresses.max() + width > self.size:
            at = int(addresses[(addresses < 0) | (addresses + width > self.size)][0])
            raise PtxError(f"{width} bytes of shared memory at {at}, of which a block has {self.size}")
        if (addresses & (aligned - 1)).any():
            raise PtxError(f"a misaligned access of {width} bytes of shared memory at {int(addresses.max())}")
        return addresses + blocks * self.stride

    def _units(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Return the units of each access, (accesses, units)."""
        first = offsets[:, None] >> (self.unit.bit_length() - 1)
        return first if width == self.unit else first + np.arange(width // self.unit)

    def _stamps(self, blocks: np.ndarray, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first stamp of the current interval and the stamp of each access, (accesses, 1)."""
        now = self.interval[blocks, None] * np.int64(self.BARRIER)
        return now, now + warps[:, None]

    def _place(self, units: np.ndarray) -> str:
        return f"at {int(units.flat[0]) * self.unit % self.stride} of shared memory"

    def note_load(self, offsets: np.ndarray, width: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Check that the bytes were written, by this warp or before a barrier, and record the read."""
        units, (now, own) = self._units(offsets, width), self._stamps(blocks, warps)
        writes = self.writes[units]
        if writes.min() < 0:
            flying = writes == self.IN_FLIGHT
            if flying.any():
                raise PtxError(f"a load of what an asynchronous copy has not delivered, {self._place(units[flying])}")
            raise PtxError(f"a load of what nobody has written, {self._place(units[writes < 0])}")
        race = (writes >= now) & (writes != own)
        if race.any():
            raise PtxError(f"a race: a load of what another warp stores, {self._place(units[race])}")
        reads = self.reads[units]
        stamps = np.where((reads >= now) & (reads != own), now + self.SEVERAL, own)
        self.reads[units] = stamps
        together = self.reads[units] != stamps  # several warps read in this instruction
        if together.any():
            self.reads[units[together]] = (stamps | self.SEVERAL)[together]

    def note_store(self, offsets: np.ndarray, width: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Check that no other warp accesses the bytes, and record the write."""
        units, (now, own) = self._units(offsets, width), self._stamps(blocks, warps)
        writes, reads = self.writes[units], self.reads[units]
        flying = writes == self.IN_FLIGHT
        if flying.any():
            raise PtxError(f"a store to what an asynchronous copy has not delivered, {self._place(units[flying])}")
        written = (writes >= now) & (writes != own)
        if written.any():
            raise PtxError(f"a race: two warps store, {self._place(units[written])}")
        read = (reads >= now) & (reads != own)
        if read.any():
            raise PtxError(f"a race: a store to what another warp loads, {self._place(units[read])}")
        self.writes[units] = own

    def note_atomic(self, offsets: np.ndarray, width: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Check atomics, which may meet atomics of other warps, but not their loads and stores."""
        units, (now, own) = self._units(offsets, width), self._stamps(blocks, warps)
        writes, reads = self.writes[units], self.reads[units]
        if writes.min() < 0:
            raise PtxError(f"an atomic on what nobody has written, {self._place(units[writes < 0])}")
        race = (writes >= now) & (writes != own) & (writes != now + self.ATOMIC)
        race |= (reads >= now) & (reads != own)
        if race.any():
            raise PtxError(f"a race: an atomic on what another warp loads or stores, {self._place(units[race])}")
        self.writes[units] = now + self.ATOMIC

    def note_tile(self, offsets: np.ndarray, block: int) -> None:
        """Check that a tile, which all warps of a warpgroup read, was written before the last barrier."""
        units, now = np.unique(offsets // self.unit), int(self.interval[block]) * self.BARRIER
        writes = self.writes[units]
        if (writes == self.IN_FLIGHT).any():
            raise PtxError(f"a race: a wgmma reads what an asynchronous copy writes, {self._place(units)}")
        if (writes < 0).any():
            raise PtxError(f"a wgmma reads what nobody has written, {self._place(units[writes < 0])}")
        if (writes >= now).any():
            units = units[writes >= now]
            raise PtxError(f"a race: a wgmma reads what is stored since the last barrier, {self._place(units)}")
        self.reads[units] = now + self.SEVERAL

    def note_start(self, offsets: np.ndarray, width: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Start a copy that may arrive at any time: until it is waited for, no warp may access its bytes."""
        self.note_store(offsets, width, blocks, warps)
        self.writes[self._units(offsets, width)] = self.IN_FLIGHT

    def note_arrival(self, offsets: np.ndarray, width: int, blocks: np.ndarray, warps: np.ndarray) -> None:
        """Finish a copy that was waited for: its own warp may read it now, other warps after the next barrier."""
        self.writes[self._units(offsets, width)] = self._stamps(blocks, warps)[1]

    def store(self, offsets: np.ndarray, columns: Sequence[np.ndarray], warps: np.ndarray) -> None:
        """Store neighbours at each offset; the store must have been recorded by `note_store`.

        Several warps may store the same numbers there, as Triton's kernels do. If lanes of one warp differ, one of them
        wins, and PTX does not say which. In reductions whose lanes fuse different multiplications, last bits differ.
        """
        size = columns[0].dtype.itemsize
        for at, column in zip(places(offsets, size, len(columns)), columns, strict=True):
            self.content[size][at] = column
            lost = self.content[size][at] != column
            if lost.any():
                units = at[lost] * size // self.unit
                others = self.writes[units] % self.BARRIER != warps[lost]
                if others.any():
                    raise PtxError(f"a race: two warps store at once, {self._place(units[others])}")
