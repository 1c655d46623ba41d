"""Second implementations of EVS, V-CAST and FlashVID, from their rules: float64 loops over one video at a time."""

from __future__ import annotations

import fractions
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


def dealt(total: int, parts: list[int]) -> list[int]:
    """Share a number out by the largest remainder: of equal ones, the first gets more."""
    if not sum(parts):
        return [0] * len(parts)
    found = [total * part // sum(parts) for part in parts]
    lost = [fractions.Fraction(total * part, sum(parts)) - n for part, n in zip(parts, found, strict=True)]
    for index in sorted(range(len(parts)), key=lambda i: (-lost[i], i))[: total - sum(found)]:
        found[index] += 1
    return found


def max_min(frame: list[Row], scores: Row, k: int) -> list[int]:
    """Choose k tokens of a frame: those far from the nearest chosen one, times their score."""

    unlike = [[1 - cosine(one, other) for other in frame] for one in frame]

    def worth(i: int, others: list[int]) -> float:
        return scores[i] * min((unlike[i][j] for j in others if j != i), default=2.0)

    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(frame)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (worth(i, chosen or list(range(len(frame)))), -i)))
    return sorted(chosen)


def peaks(rows: list[Row], k: int) -> list[int]:
    """Choose k of these rows by the peaks of their density."""

    every = range(len(rows))
    apart = [[math.dist(one, other) / math.sqrt(len(one)) for other in rows] for one in rows]
    near = min(7, k)
    density = [math.exp(-math.fsum(x * x for x in sorted(row)[:near]) / near) for row in apart]
    height = []
    for i in every:
        denser = [j for j in every if (density[j], -j) > (density[i], -i)]
        height.append(density[i] * min((apart[i][j] for j in denser), default=max(map(max, apart))))
    chosen = sorted(every, key=lambda i: (-height[i], i))[:k]
    return [i if i in chosen else min(chosen, key=lambda c: (apart[i][c], c)) for i in every]


def flashvid(rows: Tensor, scores: Tensor, keep: int | float, merge: str) -> dict[int, dict[int, float]]:
    """Return, for each token that FlashVID leaves of (T, n, D) rows, what it is made of: tokens and their weights."""
    video: list[list[Row]] = rows.double().tolist()
    frames, n = len(video), len(video[0])
    flat = [row for frame in video for row in frame]
    total = keep * frames if isinstance(keep, int) else int(keep * frames * n)
    total = min(max(total, frames), frames * n)
    each = min(math.ceil(fractions.Fraction(7 * total, 10 * frames)), total // frames)
    kept = [t * n + i for t, frame in enumerate(video) for i in max_min(frame, scores[t].tolist(), each)]
    left = total - len(kept)
    found = {token: {token: 1.0} for token in kept}

    means = [[math.fsum(channel) / n for channel in zip(*frame, strict=True)] for frame in video]
    alike = [cosine(*pair) for pair in itertools.pairwise(means)]
    cuts = {t for t, value in enumerate(alike, 1) if value < 0.9}
    cuts |= set(sorted(range(1, frames), key=lambda t: (alike[t - 1], t))[: min(8, frames) - 1])
    bounds = [0, *sorted(cuts), frames]
    segments = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    for segment, budget in zip(segments, dealt(left, [len(segment) for segment in segments]), strict=True):
        free = {t: [t * n + i for i in range(n) if t * n + i not in kept] for t in segment}
        link: dict[int, tuple[float, int]] = {}
        for before, frame in itertools.pairwise(segment):
            for token in free[frame]:
                ranked = [(cosine(flat[token], flat[other]), -other) for other in free[before]]
                if ranked and max(ranked)[0] > 0.8:
                    link[token] = (max(ranked)[0], -max(ranked)[1])
        room = sum(map(len, free.values())) - budget
        linked = {token: link[token][1] for token in sorted(link, key=lambda token: (-link[token][0], token))[:room]}
        tree: dict[int, list[int]] = {}
        for token in itertools.chain(*free.values()):
            root = token
            while root in linked:
                root = linked[root]
            tree.setdefault(root, []).append(token)
        divisor = {
            root: len(members) if merge == "mean" else 1 + sum(linked.get(token) == root for token in members)
            for root, members in tree.items()
        }
        roots = [[token for token in free[t] if token in tree] for t in segment]
        filled = [min(1, len(own)) for own in roots]
        filled = filled if sum(filled) <= budget else [0] * len(roots)
        more = dealt(budget - sum(filled), [len(own) - one for own, one in zip(roots, filled, strict=True)])
        for own, quota in zip(roots, (a + b for a, b in zip(filled, more, strict=True)), strict=True):
            if not quota:
                continue
            merged = [
                [math.fsum(channel) / divisor[root] for channel in zip(*(flat[m] for m in tree[root]), strict=True)]
                for root in own
            ]
            nearest = peaks(merged, quota)
            for center in set(nearest):
                chains = [own[i] for i, goes_to in enumerate(nearest) if goes_to == center]
                tokens = sum(len(tree[root]) for root in chains)
                found[own[center]] = {
                    token: 1 / tokens if merge == "mean" else 1 / (divisor[root] * len(chains))
                    for root in chains
                    for token in tree[root]
                }
    return found
