"""The bytes that the kernels were counted to move."""

from __future__ import annotations

import functools
import json
from pathlib import Path

REPORT = Path(__file__).parent / "results" / "static.json"


@functools.cache
def _ratios() -> dict[tuple[str, str], float]:
    if not REPORT.exists():
        return {}
    records = json.loads(REPORT.read_text())["traffic"]
    return {(record["op"], record["backend"]): record["ratio"] for record in records}


def counted(op: str, backend: str) -> float | None:
    """Return the bytes that an op's kernels move over the fewest possible, as `make static` counted them.

    Args:
        op: the op's name.
        backend: "triton", or "cuda" for the kernels of csrc/*.cu. The kernels for CPUs are not counted.

    Returns:
        The ratio, each byte counted once per launch; None where nothing was counted.
    """
    return _ratios().get((op, backend))
