"""The greedy choices against loops that say their rules, and what must hold of any choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.bad_bounds import BAD_BOUNDS, CHOSEN, TOKENS
from tests.helpers.cases import DTYPES, family, require
from vlmfast.ops.greedy_selection.cases import _decided, _signs
from vlmfast.registry import OPS

FAMILY = family("greedy_selection")


# ---- farthest ----


def farthest_by_rule(rows: list[list[float]], k: int, quality: list[float], first_by_quality: bool = True) -> list[int]:
    """Choose for one image in Python's float64."""

    def dot(i: int, j: int) -> float:
        return math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))

    def distance(i: int, j: int) -> float:
        return 1 - dot(i, j) / math.sqrt(dot(i, i) * dot(j, j))

    count = len(rows)
    chosen: list[int] = []
    while len(chosen) < k:
        best, most = -1, -math.inf
        for j in range(count):
            if j in chosen:
                continue
            others = chosen or [i for i in range(count) if i != j]
            worth = min((distance(i, j) for i in others), default=2.0)
            worth *= quality[j] if chosen or first_by_quality else 1.0
            if worth > most + 1e-12:
                best, most = j, worth
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize("first_by_quality", [True, False])
def test_farthest_follows_the_rule(backend: str, first_by_quality: bool):
    features, quality = torch.randn(2, 23, 9), torch.rand(2, 23)
    quality[0] = 1
    got = vlmfast.farthest(features, 7, quality, first_by_quality)
    for image in range(2):
        want = farthest_by_rule(features[image].tolist(), 7, quality[image].tolist(), first_by_quality)
        assert got[image].tolist() == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_are_of_no_account(backend: str, dtype: torch.dtype):
    features = torch.randn(1, 40, 12).to(dtype)
    scale = 2.0 ** torch.randint(-6, 7, (1, 40, 1))
    assert torch.equal(vlmfast.farthest(features * scale.to(dtype), 9), vlmfast.farthest(features, 9))


def test_rows_without_a_direction_are_like_nothing(backend: str):
    features = torch.ones(1, 6, 8)
    features[0, 2], features[0, 4, 1], features[0, 5, 0] = 0, torch.inf, torch.nan
    assert vlmfast.farthest(features, 1).tolist() == [[2]]
    assert vlmfast.farthest(features, 4).tolist() == [[0, 2, 4, 5]]


def test_many_tokens(backend: str):
    """More than one step of the loops of a block."""
    features = _signs(1, 1030, 5, "cpu")
    assert torch.equal(vlmfast.farthest(features, 3), OPS["farthest"].reference(features, 3))


def test_tokens_that_a_few_bits_do_not_tell_apart(backend: str):
    """On a CPU guesses from few bits say which distances are computed. Here they say little, or what is wrong."""

    def draw() -> tuple[Tensor, int]:
        tokens = torch.randn(1, 50, 40)
        tokens[..., 3] += 60
        tokens[:, ::7, 5] -= 90
        return tokens, 20

    reference = OPS["farthest"].reference
    features, k = _decided(reference, draw)
    doubles = features[:, :15].repeat(1, 3, 1)
    assert torch.equal(vlmfast.farthest(features, k), reference(features, k))
    assert torch.equal(vlmfast.farthest(doubles, 40), reference(doubles, 40))


# ---- coverage ----


def covers(similarity: list[list[float]], weights: list[float], chosen: list[int]) -> float:
    """Add up how well each row is covered by the chosen tokens of one image, in Python's float64."""
    best = (max([0.0, *(similarity[j][row] for j in chosen)]) for row in range(len(weights)))
    return math.fsum(weight * value for weight, value in zip(weights, best, strict=True))


def coverage_by_rule(similarity: list[list[float]], k: int, weights: list[float], quality: list[float]) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < k:
        now = covers(similarity, weights, chosen)
        left = [j for j in range(len(similarity)) if j not in chosen]
        gains = [round(quality[j] * (covers(similarity, weights, [*chosen, j]) - now), 10) for j in left]
        chosen.append(left[gains.index(max(gains))])
    return sorted(chosen)


def test_coverage_follows_the_rule(backend: str):
    similarity, weights, quality = torch.randn(3, 21, 30), torch.rand(3, 30), torch.rand(3, 21)
    weights[1], quality[2] = 1, 1
    got = vlmfast.coverage(similarity, 8, weights, quality)
    for image in range(3):
        want = coverage_by_rule(similarity[image].tolist(), 8, weights[image].tolist(), quality[image].tolist())
        assert got[image].tolist() == want


def test_coverage_is_near_the_best(backend: str):
    """At least 1 - 1 / e of what the best of all choices covers."""
    for k in (1, 2, 3):
        similarity = torch.randn(6, 9, 12)
        for rows, chosen in zip(similarity.tolist(), vlmfast.coverage(similarity, k).tolist(), strict=True):
            best = max(covers(rows, [1.0] * 12, list(each)) for each in itertools.combinations(range(9), k))
            assert covers(rows, [1.0] * 12, chosen) >= (1 - 1 / math.e) * best


def test_another_order_of_tokens_and_rows_covers_the_same(backend: str):
    similarity, weights, quality = torch.randn(1, 40, 30), torch.rand(1, 30), torch.rand(1, 40)
    order, rows = torch.randperm(40), torch.randperm(30)
    got = vlmfast.coverage(similarity[:, order][:, :, rows], 9, weights[:, rows], quality[:, order])
    want = set(vlmfast.coverage(similarity, 9, weights, quality)[0].tolist())
    assert set(order[got[0]].tolist()) == want


def test_doubles_add_nothing(backend: str):
    """Of five tokens, each four times, the first ones come first; then all that are left, in order."""
    similarity = torch.rand(1, 5, 33).repeat(1, 4, 1)
    for k in range(1, 6):
        assert max(vlmfast.coverage(similarity, k)[0].tolist()) < 5
    for k in range(5, 21):
        assert vlmfast.coverage(similarity, k)[0].tolist() == list(range(k))


def test_what_is_not_finite_covers_nothing(backend: str):
    similarity = torch.full((1, 4, 3), 0.5)
    similarity[0, 0], similarity[0, 1], similarity[0, 3, 0] = torch.inf, torch.nan, -torch.inf
    assert vlmfast.coverage(similarity, 1).tolist() == [[2]]
    assert vlmfast.coverage(similarity, 2).tolist() == [[0, 2]]


def test_coverage_of_many(backend: str):
    """More than one step of the loops of a block, for tokens and for rows."""
    for tokens, rows in ((1030, 9), (40, 1030)):
        similarity = torch.randint(-8, 33, (1, tokens, rows)) / 16
        assert torch.equal(vlmfast.coverage(similarity, 5), OPS["coverage"].reference(similarity, 5))


# ---- dpp_map ----


def dpp_by_rule(rows: list[list[float]], k: int, relevance: list[float]) -> list[int]:
    """Choose for one image what makes the determinant of the kernel largest; only where something new is left."""
    unit = (
        torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=1) * torch.tensor(relevance)[:, None]
    )
    kernel, chosen = unit @ unit.T, list[int]()
    while len(chosen) < k:
        left = [j for j in range(len(rows)) if j not in chosen]
        # of equal ones the first: to nine digits
        volumes = [float(f"{kernel[[*chosen, j]][:, [*chosen, j]].det():.8e}") for j in left]
        chosen.append(left[volumes.index(max(volumes))])
    return sorted(chosen)


def test_dpp_map_follows_the_rule(backend: str):
    features, relevance = torch.randn(3, 23, 12), torch.rand(3, 23)
    relevance[0] = 1
    got = vlmfast.dpp_map(features, 7, relevance)
    for image in range(3):
        assert got[image].tolist() == dpp_by_rule(features[image].tolist(), 7, relevance[image].tolist())
    assert torch.equal(vlmfast.dpp_map(features[:1], 7), got[:1])


def test_dpp_map_is_the_begin_of_a_longer_one(backend: str):
    """Also behind the tokens that add up to all others, from which on relevance tells."""
    features, relevance = torch.randn(2, 14, 6), torch.rand(2, 14)
    before: list[set[int]] = [set(), set()]
    for k in range(1, 15):
        now = [set(row) for row in vlmfast.dpp_map(features, k, relevance).tolist()]
        assert all(len(new) == k and old < new for old, new in zip(before, now, strict=True))
        if k == 6:
            first = now
        for own, new, worth in zip(first if k > 6 else now, now, relevance.tolist(), strict=True):
            others = sorted((j for j in range(14) if j not in own), key=lambda j: -worth[j])
            assert new - own == set(others[: k - len(own)])
        before = now


def test_relevance_tells_where_nothing_new_is_left(backend: str):
    """Five directions, four times: after five tokens the most relevant ones, of equal ones the first."""
    features = torch.randn(1, 5, 37).repeat(1, 4, 1)
    relevance = torch.tensor([2.0, 1.0, 0.5, 1.5]).repeat_interleave(5)[None]
    assert vlmfast.dpp_map(features, 8, relevance)[0].tolist() == [0, 1, 2, 3, 4, 15, 16, 17]


def test_rows_without_a_direction_are_the_last_ones(backend: str):
    features = torch.eye(6, 8)[None].clone()
    features[0, 2], features[0, 4, 1], features[0, 5, 0] = 0, torch.inf, torch.nan
    assert vlmfast.dpp_map(features, 3).tolist() == [[0, 1, 3]]
    assert vlmfast.dpp_map(features, 4, torch.tensor([[1.0, 1, 5, 1, 5, 2]])).tolist() == [[0, 1, 2, 3]]
    assert vlmfast.dpp_map(features, 2, torch.tensor([[0.0, 0, 0, 1, 0, 0]])).tolist() == [[0, 3]]


def test_dpp_map_of_many(backend: str):
    """More than one step of the loops of a block; and of one, by one, and of none."""
    features = _signs(1, 1030, 5, "cpu")
    relevance = torch.rand(1, 1030)
    assert torch.equal(vlmfast.dpp_map(features, 3, relevance), OPS["dpp_map"].reference(features, 3, relevance))


# ---- several of them ----


@pytest.mark.parametrize("name", ["farthest", "coverage"])
def test_a_choice_is_the_begin_of_a_longer_one(backend: str, name: str):
    rows, quality = torch.randint(-4, 9, (2, 14, 20)).float(), torch.randint(0, 5, (2, 14)).float()
    before: list[set[int]] = [set(), set()]
    for k in range(1, 15):
        now = [set(row) for row in getattr(vlmfast, name)(rows, k, quality=quality).tolist()]
        assert all(len(new) == k and old < new for old, new in zip(before, now, strict=True))
        before = now
    assert before == [set(range(14))] * 2


@pytest.mark.parametrize("name", ["farthest", "dpp_map"])
def test_another_order_of_the_tokens_chooses_the_same(backend: str, name: str):
    features, weights, order = torch.randn(1, 40, 12), torch.rand(1, 40), torch.randperm(40)
    want = set(getattr(vlmfast, name)(features, 9, weights)[0].tolist())
    got = getattr(vlmfast, name)(features[:, order], 9, weights[:, order])
    assert set(order[got[0]].tolist()) == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["farthest", "dpp_map"])
def test_doubles_come_last_and_in_order(backend: str, name: str, dtype: torch.dtype):
    """Five directions, four times, of several lengths: after five tokens all others are worth nothing."""
    rows = torch.randn(5, 37)
    features = torch.cat([rows, rows, rows * 4, rows / 2])[None].to(dtype)
    for k in range(1, 6):
        assert max(getattr(vlmfast, name)(features, k)[0].tolist()) < 5
    for k in range(5, 21):
        assert getattr(vlmfast, name)(features, k)[0].tolist() == list(range(k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_long_doubles_of_one_size_are_the_same(dtype: torch.dtype):
    """Products of equal terms round alike: added one by one, their error would tell doubles apart."""
    for scale in torch.rand(16):
        rows = scale * (2.0 * torch.randint(0, 2, (5, 8192)) - 1)
        features = torch.cat([rows, rows])[None].to(dtype)
        assert vlmfast.farthest(features, 7)[0].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("name", "weights"), [("farthest", (None, True)), ("dpp_map", (None,)), ("coverage", (None, None))]
)
def test_kernels_refuse_bounds_that_do_not_add_up(name: str, weights: tuple):
    """On a GPU only they see the bounds."""
    require(OPS[name], "triton")
    for message, bounds in BAD_BOUNDS:
        with pytest.raises(RuntimeError, match=message):
            OPS[name].backend("triton").run(torch.eye(TOKENS)[None], CHOSEN, *weights, *bounds)


def test_the_largest_image_is_not_forgotten():
    """What is known of bounds on a device: images of ``longest`` tokens must hold all tokens."""
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="longest must be the most tokens of an image, of 2 with 10, got 4"):
        vlmfast.farthest(torch.empty(1, 10, 8, device="meta"), 3, None, True, bounds, bounds, 4)


def native_calls() -> list[tuple[str, tuple[Tensor | int, ...]]]:
    features = torch.randn(3, 200, 300)
    similarity = torch.rand(3, 200, 300)
    return [
        ("farthest", (features, 20)),
        ("farthest", (features[:1], 20, torch.rand(1, 200))),
        ("dpp_map", (features, 20)),
        ("dpp_map", (features[:1], 20, torch.rand(1, 200))),
        ("coverage", (similarity, 20)),
        ("coverage", (similarity[:1], 20, torch.rand(1, 300), torch.rand(1, 200))),
    ]


@pytest.mark.parametrize("threads", [2, 3])
def test_native_threads_give_the_same_choice(threads: int):
    before = torch.get_num_threads()
    try:
        for name, args in native_calls():
            require(OPS[name], "native")
            found = []
            for count in (1, threads):
                torch.set_num_threads(count)
                with vlmfast.use("native"):
                    found.append(OPS[name].function(*args))
            assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)
