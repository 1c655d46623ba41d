"""Second implementations of EVS and V-CAST, from their rules: plain float64 loops over one video at a time."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

Row = list[float]


def dot(one: Row, other: Row) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def cosine(one: Row, other: Row) -> float:
    lengths = math.sqrt(dot(one, one)) * math.sqrt(dot(other, other))
    return dot(one, other) / lengths if lengths else 0.0


def evs(rows: Tensor, keep: int | float) -> list[int]:
    """Return the indexes that EVS keeps of the T * n tokens of (T, n, D) rows, ascending."""
    frames: list[list[Row]] = rows.double().tolist()
    count = len(frames[0])
    total = keep * len(frames) if isinstance(keep, int) else int(keep * len(frames) * count)
    worth = [255.0] * count
    for before, frame in itertools.pairwise(frames):
        for old, new in zip(before, frame, strict=True):
            worth.append(0.0 if old == new else 1 - cosine(old, new))
    ranked = sorted(range(len(worth)), key=lambda i: (-worth[i], i))
    return sorted(ranked[: max(count, total)])


def curvatures(rows: Tensor) -> list[float]:
    """Return the curvature of each frame of (T, n, D) rows."""
    frames: list[list[Row]] = rows.double().tolist()
    means = [[math.fsum(channel) / len(frame) for channel in zip(*frame, strict=True)] for frame in frames]
    units = [[x / math.sqrt(dot(mean, mean)) for x in mean] for mean in means]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(units)]
    bends = [1 - cosine(*pair) for pair in itertools.pairwise(steps)]
    return [1.0, *bends, 1.0][: len(frames)] if len(frames) > 1 else [1.0]


def quotas(rows: Tensor, total: int, remainder: str) -> tuple[list[int], int]:
    """Return how many tokens each frame keeps, and how often a frame got a token of the remainder."""
    most = rows.shape[1]
    exponentials = [math.exp(bend / 0.7) for bend in curvatures(rows)]
    spare = total - len(exponentials)
    shares = [spare * x / sum(exponentials) for x in exponentials]
    found = [1 + min(math.floor(share), most - 1) for share in shares]
    lost = [share - math.floor(share) for share in shares]
    served = [0] * len(shares)
    while sum(found) < total:
        open_ = [t for t in range(len(found)) if found[t] < most]
        best = max(open_, key=lambda t: (lost[t] - (served[t] if remainder == "largest" else 0), -t))
        found[best] += 1
        served[best] += 1
    return found, max(served)


def vcast(rows: Tensor, keep: int | float, remainder: str = "largest") -> list[int]:
    """Return the indexes that V-CAST keeps of the T * n tokens of (T, n, D) rows, ascending."""
    frames: list[list[Row]] = rows.double().tolist()
    count = len(frames[0])
    if len(frames) == 1:
        return list(range(count))
    total = keep * len(frames) if isinstance(keep, int) else round(keep * len(frames) * count)
    total = min(max(total, len(frames)), len(frames) * count)
    kept = []
    for number, (frame, quota) in enumerate(zip(frames, quotas(rows, total, remainder)[0], strict=True)):
        mean = [math.fsum(channel) / count for channel in zip(*frame, strict=True)]
        lengths = [math.sqrt(dot(row, row)) for row in frame]
        low, high = min(lengths), max(lengths)
        worth = [
            1 - cosine(row, mean) + (length - low) / (high - low + 1e-6)
            for row, length in zip(frame, lengths, strict=True)
        ]
        ranked = sorted(range(count), key=lambda i: (-worth[i], i))
        kept += [number * count + i for i in ranked[:quota]]
    return sorted(kept)
