"""Races in global memory: accesses of two warps to the same bytes, one of them a store, that no barrier orders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.parse import PtxError

Who = Sequence[np.ndarray]  # of each access: the block in its grid, the warp in its block, how many barriers it passed


class Order:
    """Who accessed each unit of a region last. Nothing orders two blocks of a launch."""

    NOBODY, SEVERAL = -1, -2  # values besides the numbers of blocks and warps

    def __init__(self, size: int, unit: int) -> None:
        self.unit = unit
        self.stores, self.loads = ([np.full(-(-size // unit), self.NOBODY, np.int32) for _ in range(3)] for _ in "sl")

    def _units(self, offsets: np.ndarray, width: int, who: Who) -> tuple[np.ndarray, list[np.ndarray]]:
        count = width // self.unit
        units = offsets[:, None] // self.unit + np.arange(count)
        return units.reshape(-1), [np.repeat(value, count) for value in who]

    def _unordered(self, last: Who, units: np.ndarray, now: Who) -> np.ndarray:
        """Return which units another warp accessed without a barrier since."""
        block, warp, passed = (array[units] for array in last)
        return (block != self.NOBODY) & ((block != now[0]) | ((warp != now[1]) & (passed == now[2])))

    def _check(self, race: np.ndarray, units: np.ndarray, what: str) -> None:
        if race.any():
            at = int(units[race][0]) * self.unit
            raise PtxError(f"a race: {what}, {at} bytes behind the begin of a tensor")

    def note_load(self, offsets: np.ndarray, width: int, who: Who) -> None:
        units, now = self._units(offsets, width, who)
        self._check(self._unordered(self.stores, units, now), units, "a load of what another warp stores")
        block, warp, passed = (array[units] for array in self.loads)
        together = (block == now[0]) & (passed == now[2])
        loads = [
            np.where((block == self.NOBODY) | (block == now[0]), now[0], self.SEVERAL),
            np.where(together & (warp != now[1]), self.SEVERAL, now[1]),
            now[2],
        ]
        for array, value in zip(self.loads, loads, strict=True):
            array[units] = value
        for array, value in zip(self.loads[:2], loads[:2], strict=True):  # several load in this instruction
            array[units[array[units] != value]] = self.SEVERAL

    def note_store(self, offsets: np.ndarray, width: int, who: Who) -> None:
        units, now = self._units(offsets, width, who)
        self._check(self._unordered(self.stores, units, now), units, "two warps store")
        self._check(self._unordered(self.loads, units, now), units, "a store to what another warp loads")
        for array, value in zip(self.stores, now, strict=True):
            array[units] = value
        self._check(self._unordered(self.stores, units, now), units, "two warps store at once")
