"""Upper bounds of the speed on GPUs, as shares of a copy of as many bytes: computed from compiled kernels, not timed.

A launch takes at least the longest of these; several launches of a call take at least the sum. The longest is the
reason of a bound:

* bandwidth: the bytes that it moves, as fast as a large copy.
* in flight: the bytes that it loads, in turns of what the resident programs have in flight, each as long as the
  latency of an idle memory. Below CUB's threshold a kernel is named for it at 100 % too: some of the bandwidth is lost,
  and nothing here tells how much.
* issue: the instructions of all threads, as fast as the schedulers can issue any.
* programs: either of these two, because the launch has fewer programs than the GPU has room for.

A call and a copy have the time of an empty launch in common. What is not in a bound (gaps between launches, stalls,
clocks below the highest) makes a kernel slower than its bound. Two things may make it faster than a copy, at
100 %: reading much more than it writes, because the memory turns between both in a copy, and partial sums that never
leave the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfast.benchmarks.ops import STATIC_REPORT

COPIED = 0.85  # a copy's share of the published bandwidth; more would make the bounds lower
LATENCY = 0.25e-6  # seconds of an idle memory; microbenchmarks of A100 and H100 found more
CACHED = 0.13e-6  # seconds of an idle cache, in which a later launch of a call may find what an earlier one has moved
LAUNCH = 2e-6  # seconds between two events around an empty launch; fewer would make the bounds lower
AT_ONCE = 0.9  # a launch that has this share of its bytes in flight at once has no more to load
EXPLAINED = (
    "Nothing here was timed. Each number is the most that the Triton kernels of a call can reach in bfloat16, as a "
    "share of a copy of as many bytes, computed from their compiled code. What holds it back: in flight, fewer bytes "
    "than CUB's threshold; issue, too many instructions; programs, too few of them; where nothing is said, bandwidth"
)


@dataclass(frozen=True)
class Gpu:
    """Published facts about a GPU.

    Attributes:
        target: the compiler's name.
        multiprocessors: their number.
        shared: bytes of shared memory of a multiprocessor.
        needed: bytes that a multiprocessor needs in flight for its full bandwidth: CUB's `arch_to_min_bytes_in_flight`.
        bandwidth: bytes per second.
        clock: the highest, in Hz.
    """

    target: str
    multiprocessors: int
    shared: int
    needed: int
    bandwidth: float
    clock: float

    @property
    def copied(self) -> float:
        """Return the bytes per second of a large copy."""
        return COPIED * self.bandwidth

    @property
    def issued(self) -> float:
        """Return the most instructions of threads per second: those of four warps per clock and multiprocessor."""
        return self.multiprocessors * 128 * self.clock


# CUB has a threshold for V100 too, for which no kernel is compiled.
GPUS = {
    "A100": Gpu("sm_80", 108, 164 << 10, 16 << 10, 2.04e12, 1.41e9),
    "H100": Gpu("sm_90", 132, 228 << 10, 32 << 10, 3.35e12, 1.98e9),
    "H200": Gpu("sm_90", 132, 228 << 10, 48 << 10, 4.8e12, 1.98e9),
    "B200": Gpu("sm_100", 148, 228 << 10, 64 << 10, 8.0e12, 1.97e9),
}


@dataclass(frozen=True)
class Launch:
    """One launch on one GPU.

    Attributes:
        kernel: its name.
        programs: their number.
        resident: how many of them a multiprocessor has room for.
        each: the most bytes that a program has in flight.
        read: bytes that it loads, each counted once.
        stored: bytes that it stores.
        instructions: of all threads together.
    """

    kernel: str
    programs: int
    resident: int
    each: int
    read: int
    stored: int
    instructions: int

    def in_flight(self, gpu: Gpu) -> int:
        """Return the bytes in flight per multiprocessor."""
        return int(min(self.resident, self.programs / gpu.multiprocessors) * self.each)

    def at_once(self, gpu: Gpu) -> float:
        """Return the share of all bytes that it loads which is in flight at once."""
        return min(1.0, self.in_flight(gpu) * gpu.multiprocessors / max(self.read, 1))

    def fills(self, gpu: Gpu) -> bool:
        """Tell whether there are as many programs as the GPU has room for."""
        return self.programs >= self.resident * gpu.multiprocessors


def least_seconds(launch: Launch, gpu: Gpu, latency: float = LATENCY) -> dict[str, float]:
    """Return the least time of a launch by each reason."""
    room, loads = launch.resident * gpu.multiprocessors, launch.read * latency / max(launch.each, 1)
    issue = launch.instructions / gpu.issued
    few = max(loads / min(launch.programs, room), issue / min(1.0, launch.programs / gpu.multiprocessors))
    found = {
        "bandwidth": (launch.read + launch.stored) / gpu.copied,
        "in flight": loads / room,
        "issue": issue,
    }
    return found | ({} if launch.fills(gpu) else {"programs": few if few > max(found.values()) else 0.0})


def bound(launches: Sequence[Launch], gpu: Gpu, moved: int) -> tuple[float, str]:
    """Return the most that launches reach of a copy of ``moved`` bytes, and the reason."""
    least = [least_seconds(launch, gpu, CACHED if later else LATENCY) for later, launch in enumerate(launches)]
    longest = [max(found.values()) for found in least]
    share = min(1.0, (LAUNCH + moved / gpu.copied) / (LAUNCH + sum(longest)))
    if round(share, 2) < 1:
        losses = [most - found["bandwidth"] for most, found in zip(longest, least, strict=True)]
        worst = least[losses.index(max(losses))]
        return share, max(worst, key=lambda reason: worst[reason])
    largest = max(launches, key=lambda launch: launch.read + launch.stored)
    if largest.in_flight(gpu) >= gpu.needed or largest.at_once(gpu) >= AT_ONCE:
        return share, "bandwidth"
    return share, "in flight" if largest.fills(gpu) else "programs"


def record(op: str, workload: str, moved: int, launches: Mapping[str, Sequence[Launch]]) -> dict[str, Any]:
    """Make the record of a call, or of one kernel of it, from its bytes and its launches on each of the `GPUS`."""
    found: dict[str, Any] = {"op": op, "workload": workload, "kernels": []}
    for name, of_gpu in launches.items():
        share, reason = bound(of_gpu, GPUS[name], moved)
        found["kernels"] = [launch.kernel for launch in of_gpu]
        found[name] = [max(0.01, round(share, 2)), reason]
    return found


# ---- what is shown ----


def calls() -> list[dict[str, Any]]:
    """Return the records of whole calls from the static report: of each op and workload, that with all kernels."""
    records = json.loads(STATIC_REPORT.read_text()).get("predicted", []) if STATIC_REPORT.exists() else []
    whole: dict[tuple[str, str], dict[str, Any]] = {}
    for found in records:
        key = found["op"], found["workload"]
        if key not in whole or len(found["kernels"]) > len(whole[key]["kernels"]):
            whole[key] = found
    return list(whole.values())


def gpu_of(environment: Mapping[str, Any]) -> str | None:
    """Return which of the `GPUS` a run was on, or None; a part of one, or another with its name, is none of them."""
    words = re.split(r"[\s-]", environment["device"])
    for name, gpu in GPUS.items():
        if name in words and not {"PCIe", "NVL"} & {*words}:
            whole = environment.get("multiprocessors", gpu.multiprocessors) == gpu.multiprocessors
            return name if whole and environment["kind"] != "cpu" else None
    return None


def measured(run: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Map op and workload to what the Triton kernels reached of a copy in a run in bfloat16; empty if on no GPU."""
    if gpu_of(run["environment"]) is None:
        return {}
    return {
        (found["op"], found["workload"]): 1 / row["over_copy"]
        for found in run["records"]
        if found["dtype"] == "bfloat16"
        for row in found["contenders"]
        if row["name"] == "vlmfast triton" and row.get("over_copy")
    }


def rows(runs: Iterable[Mapping[str, Any]], ops: Iterable[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table: op, shape, a bound per GPU, and a column for each of them in ``runs``.

    Args:
        runs: of ops, as `report.read` returns them; those on other devices are left out.
        ops: the ops to show; None for all.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for run in runs:
        if (name := gpu_of(run["environment"])) is not None:
            found[name] = found.get(name, {}) | measured(run)
    heads = ["op", "shape", *(f"{name}, at most" for name in GPUS), *(f"{name}, measured" for name in found)]
    shown = []
    for call in calls():
        if ops is None or call["op"] in ops:
            shares = [times.get((call["op"], call["workload"])) for times in found.values()]
            cells = [_cell(*call[name]) for name in GPUS]
            cells += ["" if share is None else f"{share:.0%}" for share in shares]
            shown.append([call["op"], call["workload"], *cells])
    return heads, shown


def _cell(share: float, reason: str) -> str:
    return f"{share:.0%}" if reason == "bandwidth" else f"{share:.0%}, {reason}"
