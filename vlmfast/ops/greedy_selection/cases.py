"""How the greedy choices of tokens are tested and timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.cases import Args, BadCall, Cases, Samples, Workloads
from vlmfast.ops.greedy_selection import definition
from vlmfast.ops.greedy_selection.loops import apart, coverage_loop, dpp_map_loop, farthest_loop

# ---- numbers for which every order of the sums gives the same choice ----


def _signs(batch: int, tokens: int, size: int, device: str) -> Tensor:
    """Draw rows of a power of four of signs, and zeros: their cosines, many of them equal, are exact in any order."""
    signs = 4 ** ((size.bit_length() - 1) // 2) if size else 0
    places = torch.rand(batch, tokens, size, device=device).argsort(2)
    return torch.where(places < signs, torch.randint(0, 2, places.shape, device=device) * 2.0 - 1.0, 0.0)


def _eighths(*shape: int, device: str, most: int = 16) -> Tensor:
    return torch.randint(0, most + 1, shape, device=device) / 8


def _begin_of(draw: Callable[[], Args], count: int) -> Callable[[], Args]:
    """Draw calls without their last arguments."""
    return lambda: draw()[:count]


def _decided(reference: Callable[..., Tensor], draw: Callable[[], Args]) -> Args:
    """Draw calls until one has an answer that numbers a little different do not change."""
    while True:
        args = draw()

        def nudged(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() * (1 + 2e-5 * torch.randn_like(value, dtype=torch.float64)) if is_float else value

        want = reference(*args)
        if all(torch.equal(reference(*map(nudged, args)), want) for _ in range(3)):
            return args


# ---- calls to test, to refuse and to time ----

# images of different sizes in a row, and how many tokens are chosen of each
_ROWS = [
    ([5, 70, 0, 1, 13], [2, 9, 0, 1, 13]),
    ([12, 3], [0, 2]),
    ([], []),
    ([130, 64, 258], [7, 0, 5]),
]


def _bounds(sizes: list[int], kept: list[int], device: str) -> Args:
    """Make the last arguments of a call for images in a row."""
    ends = (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (sizes, kept))
    return *ends, max(sizes, default=0)


# B, N, D, k
_SIZES = [
    (1, 1, 8, 1),
    (2, 17, 64, 5),
    (3, 20, 7, 20),
    (2, 64, 96, 10),
    (1, 12, 32, 0),
    (0, 9, 16, 4),
    (2, 0, 16, 0),
    (1, 257, 40, 9),
    (2, 100, 0, 6),
    (1, 530, 4, 3),
    (1, 70, 1032, 12),
]


def farthest_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (batch, tokens, size, k) in enumerate(_SIZES):
        features = _signs(batch, tokens, size, device)
        if index % 4 == 3:
            features[:, ::3] = 0
            features[:, 1::5] *= 4
        quality = _eighths(batch, tokens, device=device).to(dtype)
        given = ((), (quality,), (quality.float(), False), (quality, True))[index % 4]
        yield features.to(dtype), k, *given
    for index, (sizes, kept) in enumerate(_ROWS):
        weights = _eighths(1, sum(sizes), device=device).to(dtype) if index % 3 == 0 else None
        features = _signs(1, sum(sizes), (16, 64)[index % 2], device).to(dtype)
        yield features, sum(kept), weights, index % 2 == 0, *_bounds(sizes, kept, device)
    doubles = _signs(1, 15, 64, device).repeat(1, 4, 1).to(dtype)
    yield doubles, 20
    yield doubles, 20, torch.zeros(1, 60, device=device, dtype=dtype)
    for shape, chosen in (((1, 50, 24), 12), ((2, 33, 130), 8)):

        def draw(shape: tuple[int, ...] = shape, k: int = chosen) -> Args:
            features = torch.randn(shape, device=device, dtype=dtype)
            return features, k, torch.rand(shape[:2], device=device).to(dtype)

        yield _decided(definition.farthest.op.reference, draw)
        yield _decided(definition.farthest.op.reference, _begin_of(draw, 2))


def dpp_map_samples(device: str, dtype: torch.dtype) -> Samples:
    """Yield tokens that are alike or have nothing in common, of which all numbers are exact, and others."""

    def one_of_each(batch: int, tokens: int, size: int) -> Tensor:
        features = torch.zeros(batch, tokens, size, device=device)
        if size:
            places = torch.randint(0, size, (batch, tokens, 1), device=device)
            lengths = 2.0 ** torch.randint(-3, 4, places.shape, device=device)
            features.scatter_(2, places, lengths * (1 - 2 * torch.randint(0, 2, places.shape, device=device)))
            features[:, 3::7] = 0
        return features

    for index, (batch, tokens, size, k) in enumerate(_SIZES):
        features, worth = one_of_each(batch, tokens, size), _eighths(batch, tokens, device=device)
        yield features.to(dtype), k, *((), (worth.to(dtype),), (worth,))[index % 3]
    for index, (sizes, kept) in enumerate(_ROWS):
        relevance = _eighths(1, sum(sizes), device=device).to(dtype) if index % 3 == 0 else None
        features = one_of_each(1, sum(sizes), (9, 40)[index % 2])
        yield features.to(dtype), sum(kept), relevance, *_bounds(sizes, kept, device)
    for shape, chosen in (((1, 50, 24), 12), ((2, 33, 130), 8), ((1, 40, 8), 20), ((1, 300, 64), 24)):

        def draw(shape: tuple[int, ...] = shape, k: int = chosen) -> Args:
            features = torch.randn(shape, device=device, dtype=dtype)
            return features, k, torch.rand(shape[:2], device=device).to(dtype)

        yield _decided(definition.dpp_map.op.reference, draw)

        def draw_alike(draw: Callable[[], Args] = draw) -> Args:
            """Draw tokens of one relevance, which is nudged too: float32 rounds what is left of a token near 1."""
            features, k, relevance = draw()
            relevance = torch.ones_like(relevance)
            relevance[:, 0] = 2  # of equal ones it is the first anyway
            return features, k, relevance

        if shape[1] < 100 and shape[2] > 8:
            yield _decided(definition.dpp_map.op.reference, draw_alike)[:2]


# B, N, R, k
_COVERAGES = [
    (1, 1, 1, 1),
    (2, 17, 64, 5),
    (3, 20, 7, 20),
    (2, 70, 130, 24),
    (1, 12, 32, 0),
    (0, 9, 16, 4),
    (2, 0, 16, 0),
    (1, 257, 96, 9),
    (2, 30, 0, 6),
    (1, 530, 5, 3),
    (1, 20, 530, 7),
]
# As `_ROWS`, but an image has tokens in all positions of a program, and of another so many are chosen that a wrong gain
# shows.
_COVERED_ROWS = [
    ([5, 70, 0, 1, 13], [2, 24, 0, 1, 13]),
    ([12, 800], [0, 4]),
    ([], []),
    ([130, 64, 258], [7, 0, 5]),
]
_EQUALS = 32


def _equals(rows: int, device: str) -> Tensor:
    """Make images whose tokens cover the rows equally well, but for one that is better by a sixteenth, in each another.

    So each gain decides a choice.
    """
    order = torch.rand(_EQUALS, _EQUALS, rows, device=device).argsort(-1)
    similarity = (torch.randint(0, 33, (_EQUALS, 1, rows), device=device) / 16).expand_as(order).gather(-1, order)
    best = torch.arange(_EQUALS, device=device)
    similarity[best, best, torch.randint(0, rows, (_EQUALS,), device=device)] += 1 / 16
    return similarity.flatten(0, 1)[None]


def coverage_samples(device: str, dtype: torch.dtype) -> Samples:
    def whole(*shape: int) -> Tensor:
        """Draw sixteenths, whose sums are exact, and a few infinities, which cover nothing. Row 0 decides first."""
        sixteenths = torch.randint(-8, 33, shape, device=device) / 16
        sixteenths[..., :1] *= 8
        return sixteenths.masked_fill(torch.rand(shape, device=device) < 0.03, torch.inf)

    for index, (batch, tokens, rows, k) in enumerate(_COVERAGES):
        # both may have another dtype than the similarity, narrower or wider
        narrow, wide = torch.bfloat16 if index == 3 else dtype, torch.float32 if index % 4 == 3 else dtype
        weights = _eighths(batch, rows, device=device, most=3).to(narrow) if index % 2 else None
        quality = _eighths(batch, tokens, device=device).to(wide) if index % 4 > 1 else None
        yield whole(batch, tokens, rows).to(dtype), k, weights, quality
    for index, (sizes, kept) in enumerate(_COVERED_ROWS):
        weights = _eighths(len(sizes), 250, device=device, most=3).to(dtype) if index % 2 == 0 else None
        quality = _eighths(1, sum(sizes), device=device).to(dtype) if index % 3 == 0 else None
        similarity = whole(1, sum(sizes), 250)
        similarity[:, 112:803:230] *= 64  # they are the first ones chosen of 800, with few others looked at
        yield similarity.to(dtype), sum(kept), weights, quality, *_bounds(sizes, kept, device)
    for size in (12, 34) if dtype == torch.float32 else ():  # gains are in float32 for every dtype
        similarity = torch.cat([whole(1, size, 250), _equals(250, device)], 1).to(dtype)
        quality = similarity.new_ones(similarity.shape[:2]) if size == 34 else None
        bounds = _bounds([size, *[_EQUALS] * _EQUALS], [2, *[1] * _EQUALS], device)
        yield similarity, 2 + _EQUALS, None, quality, *bounds
    for kind in (torch.bfloat16, torch.float32) if dtype == torch.float32 else ():
        similarity = _equals(112, device).view(_EQUALS, _EQUALS, -1)
        yield similarity, 1, torch.ones(_EQUALS, 112).to(device, kind), torch.ones(_EQUALS, _EQUALS, device=device)
    yield whole(1, 15, 40).repeat(1, 4, 1).to(dtype), 20
    yield whole(1, 15, 40).to(dtype), 9, None, torch.zeros(1, 15, device=device, dtype=dtype)

    def draw() -> Args:
        directions = F.normalize(torch.randn(2, 40, 6, device=device), dim=2)
        quality = torch.rand(2, 40, device=device).to(dtype)
        return (directions @ directions.transpose(1, 2)).to(dtype), 9, None, quality

    yield _decided(definition.coverage.op.reference, draw)
    yield _decided(definition.coverage.op.reference, _begin_of(draw, 2))


# The crops of LLaVA-NeXT, an image of LLaVA-1.5 and one in Qwen2.5-VL: B, N, D, k
_WORKLOADS = [(5, 576, 1024, 64), (1, 576, 4096, 64), (1, 1296, 3584, 130)]
# Three images of one prompt in Qwen2.5-VL, of which a tenth is kept
_PROMPT, _PROMPT_KEPT = [256, 600, 432], [26, 60, 43]
_PROMPT_LABEL = "+".join(map(str, _PROMPT))


def farthest_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for batch, tokens, size, k in _WORKLOADS:
        yield f"{batch}x{tokens}x{size}", (torch.randn(batch, tokens, size, device=device, dtype=dtype), k)
    features = torch.randn(1, sum(_PROMPT), 3584, device=device, dtype=dtype)
    yield f"{_PROMPT_LABEL}x3584", (features, sum(_PROMPT_KEPT), None, True, *_bounds(_PROMPT, _PROMPT_KEPT, device))


def dpp_map_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, (features, k, *more) in farthest_workloads(device, dtype):
        yield label, (features, k, torch.rand(features.shape[:2], device=device), *more[2:])


def coverage_workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield cosines as SCOPE takes them, in float32 whatever the model's dtype: each token is like some others."""

    def cosines(batch: int, tokens: int) -> Tensor:
        near = torch.randn(batch, tokens // 24 + 1, 64, device=device).repeat_interleave(24, 1)[:, :tokens]
        unit = F.normalize(torch.randn(batch, tokens, 64, device=device) + near + 1, dim=2)
        return unit @ unit.transpose(1, 2)

    for batch, tokens, _, k in _WORKLOADS:
        yield f"{batch}x{tokens}", (cosines(batch, tokens), k, None, torch.rand(batch, tokens, device=device))
    each = [F.pad(cosines(1, tokens), (0, max(_PROMPT) - tokens)) for tokens in _PROMPT]
    quality = torch.rand(1, sum(_PROMPT), device=device)
    bounds = _bounds(_PROMPT, _PROMPT_KEPT, device)
    yield _PROMPT_LABEL, (torch.cat(each, 1), sum(_PROMPT_KEPT), None, quality, *bounds)


# ---- the bytes of calls ----


def _of_images(op: Any, count: Callable[..., int]) -> Callable[..., int]:
    """Add up what the images of a call take: their tokens are compared with those of the same image."""
    return lambda *args: sum(count(*call) for _, call in apart(op, *args))


def farthest_bytes(features: Tensor, k: int, quality: Tensor | None = None, *more: Any) -> int:
    """Count features in, and out the matrix of their products, all of which the first choice reads again."""
    batch, tokens = features.shape[:2]
    return features.nbytes + 8 * batch * tokens**2 + (0 if quality is None else quality.nbytes) + 8 * batch * k


def dpp_map_bytes(features: Tensor, k: int, relevance: Tensor | None = None, *more: Any) -> int:
    """Count features in, and out the matrix of their products, of which the rows of chosen tokens are read again."""
    batch, tokens = features.shape[:2]
    return features.nbytes + 4 * batch * tokens * (tokens + 3 * k) + (0 if relevance is None else relevance.nbytes)


def coverage_bytes(
    similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None, *more: Any
) -> int:
    """Count all operands once: what is read again depends on them."""
    given = [x for x in (similarity, row_weights, quality) if x is not None]
    return sum(x.nbytes for x in given) + 8 * similarity.shape[0] * k


# ---- the cases of each op ----

_FEATURES, _QUALITY = torch.eye(5, 8)[None], torch.ones(1, 5)
_ENDS, _KEPT = (torch.tensor(each, dtype=torch.int32) for each in ([0, 2, 5], [0, 0, 1]))
_ROW = {"cu_seqlens": _ENDS, "cu_kept": _KEPT, "longest": 3}
_BAD_K = (
    ("k", 6, ValueError, "k must be within 0 and 5, the tokens of a row, got 6"),
    ("k", -1, ValueError, "k must be within 0 and 5, the tokens of a row, got -1"),
    ("k", 1.0, TypeError, "k must be an int, got float"),
)


def _bad_images(name: str, rows: Tensor) -> tuple[BadCall, ...]:
    both = "cu_seqlens and cu_kept must be given together"
    return (
        ("cu_seqlens", None, TypeError, both),
        ("cu_kept", None, TypeError, both),
        ("cu_seqlens", _ENDS.long(), TypeError, "cu_seqlens must be int32, got torch.int64"),
        ("cu_seqlens", _ENDS[None], ValueError, r"cu_seqlens must have shape \(images \+ 1,\), got \(1, 3\)"),
        ("cu_seqlens", _ENDS[:2], ValueError, rf"cu_seqlens must rise from 0 to 5, the tokens of {name}, got \[0, 2\]"),
        ("cu_seqlens", _ENDS[[0, 1, 1, 2]], ValueError, r"cu_kept must have the shape of cu_seqlens, \(4,\), got"),
        ("cu_seqlens", _ENDS[[0, 2, 2]], ValueError, "longest must be the most tokens of an image, 5, got 3"),
        ("cu_kept", 2 * _KEPT, ValueError, r"cu_kept must rise from 0 to 1, which is k, got \[0, 0, 2\]"),
        ("longest", 2, ValueError, "longest must be the most tokens of an image, 3, got 2"),
        ("longest", 6, ValueError, "longest must be within 0 and 5, the tokens of a row, got 6"),
        ("longest", 3.0, TypeError, "longest must be an int, got float"),
        (name, rows.repeat(2, 1, 1), ValueError, f"{name} must have a batch of 1 with cu_seqlens.*, got 2"),
    )


def _bad_weights(name: str, good: Tensor) -> tuple[BadCall, ...]:
    message = f"{name} must be finite and not negative"
    return tuple((name, good * factor, ValueError, message) for factor in (-1.0, torch.inf, torch.nan))


farthest = Cases(
    samples=farthest_samples,
    good_call={"features": _FEATURES, "k": 1, "quality": _QUALITY, "first_by_quality": True, **_ROW},
    bad_calls=(
        ("features", _FEATURES[0], ValueError, r"features must have shape \(B, N, D\), got \(5, 8\)"),
        ("quality", _QUALITY[0], ValueError, r"quality must have shape \(B, N\), got \(5,\)"),
        ("quality", _QUALITY[:, :4], ValueError, r"quality must have the first two sizes of features, \(1, 5\)"),
        *(*_BAD_K, *_bad_weights("quality", _QUALITY), *_bad_images("features", _FEATURES)),
    ),
    workloads=farthest_workloads,
    bytes=_of_images(definition.farthest, farthest_bytes),
    flops=_of_images(definition.farthest, lambda features, k, *_: 2 * features.numel() * features.shape[1]),
    peers={"loop": farthest_loop},
    launches=2,
    compute_bound="all tokens are compared with all others, and then a choice waits for the one before it",
)

dpp_map = Cases(
    samples=dpp_map_samples,
    good_call={"features": _FEATURES, "k": 1, "relevance": _QUALITY, **_ROW},
    bad_calls=(
        ("features", _FEATURES[0], ValueError, r"features must have shape \(B, N, D\), got \(5, 8\)"),
        ("relevance", _QUALITY[0], ValueError, r"relevance must have shape \(B, N\), got \(5,\)"),
        ("relevance", _QUALITY[:, :4], ValueError, r"relevance must have the first two sizes of features, \(1, 5\)"),
        *(*_BAD_K, *_bad_weights("relevance", _QUALITY), *_bad_images("features", _FEATURES)),
    ),
    workloads=dpp_map_workloads,
    bytes=_of_images(definition.dpp_map, dpp_map_bytes),
    flops=_of_images(
        definition.dpp_map,
        lambda features, k, *_: 2 * features.numel() * features.shape[1] + features[..., 0].numel() * k * k,
    ),
    peers={"loop": dpp_map_loop},
    launches=2,
    compute_bound="all tokens are compared with all others, and then a choice waits for the one before it",
)

_SIMILARITY, _WEIGHTS = torch.ones(1, 5, 7), torch.ones(2, 7)

coverage = Cases(
    samples=coverage_samples,
    good_call={"similarity": _SIMILARITY, "k": 1, "row_weights": _WEIGHTS, "quality": _QUALITY, **_ROW},
    bad_calls=(
        ("similarity", _SIMILARITY[0], ValueError, r"similarity must have shape \(B, N, R\), got \(5, 7\)"),
        ("row_weights", _WEIGHTS[0], ValueError, r"row_weights must have shape \(B, R\), got \(7,\)"),
        ("row_weights", _WEIGHTS[:, :4], ValueError, r"row_weights must have shape \(2, 7\), got \(2, 4\)"),
        ("quality", _QUALITY[:, :4], ValueError, r"quality must have the first two sizes of similarity, \(1, 5\)"),
        *(*_BAD_K, *_bad_weights("quality", _QUALITY), *_bad_weights("row_weights", _WEIGHTS)),
        *_bad_images("similarity", _SIMILARITY),
    ),
    workloads=coverage_workloads,
    bytes=coverage_bytes,
    flops=lambda similarity, k, *_: 3 * similarity.numel(),
    peers={"loop": coverage_loop},
    compute_bound="each choice waits for the one before it",
)
